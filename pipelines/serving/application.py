"""The Serve application: an `Api` deployment in front of a `Sampler` deployment."""

from typing import Any

from ray import serve

from pipelines.config.serve import ServeConfig
from pipelines.serving.deployments import Sampler, api_builder
from pipelines.serving.registry_watcher import ServeArgs

_HEALTH: dict[str, Any] = {"health_check_period_s": 2.0, "health_check_timeout_s": 30.0}
"""A lost replica is replaced once it has been asked after."""
JSON_LOGS = {"log_level": "INFO", "encoding": "JSON"}


def build(args: ServeArgs) -> serve.Application:
    """The application for YAML, `import_path: pipelines.serve:build`."""
    return make_application(args, JSON_LOGS)


def make_application(args: ServeArgs, logging_config: dict[str, Any]) -> serve.Application:
    """The application for `serve.run`.

    Raises:
        ValueError: MLflow is named and has no such registered model, or no champion, or there are no keys in
            the file that should have them.
    """
    args = args.resolved()
    args.current_version()  # fails here, not on a replica
    config = args.serve
    at_most = config.max_batch_size + config.max_waiting
    sampler = serve.deployment(
        name="Sampler",
        **_replicas(config),
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": int(config.use_gpu)},
        # A replica says itself when it is full: it knows what waits and how long that will take.
        max_ongoing_requests=at_most + config.max_images_per_request,
        # All images of a request are queued for a moment before they are handed out.
        max_queued_requests=at_most + config.max_images_per_request,
        # A model that does not fit its router fits no better the third time.
        max_constructor_retry_count=1,
        # A line an image says nothing that `Api`'s line a request does not.
        logging_config={**logging_config, "enable_access_log": False},
        **_HEALTH,
    )(Sampler)
    api = serve.deployment(
        name="Api",
        num_replicas=config.api_replicas,
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=1000,
        max_queued_requests=100,
        logging_config=logging_config,
        **_HEALTH,
    )(serve.ingress(api_builder(config))())
    return api.bind(sampler.bind(args))


def _replicas(config: ServeConfig) -> dict[str, Any]:
    """How many sampling replicas there are."""
    if config.max_replicas == config.min_replicas:
        return {"num_replicas": config.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing or 2 * config.max_batch_size,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
        }
    }


def __getattr__(name: str) -> serve.Application:
    """`app`, made when it is asked for: `serve build pipelines.serving.application:app` takes no builder."""
    if name != "app":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return build(ServeArgs.model_validate({}))
