"""Build the Serve application from its two deployments.

`Api` serves HTTP, and `Sampler` holds the model and generates images.
"""

from typing import Any

from ray import serve

from ..config.serve import ServeConfig
from .deployments import GENERATION_DEPLOYMENT, GenerationDeployment, api_builder
from .serve_args import ServeArgs

HEALTH_CHECK_PERIOD_S = 2.0
_HEALTH: dict[str, Any] = {"health_check_period_s": HEALTH_CHECK_PERIOD_S, "health_check_timeout_s": 30.0}
"""How often Serve checks a replica, and how long it waits for the answer, before it replaces the replica."""
_ANSWERING_S = 10.0
"""How long the rest of an answer may take once its last trajectory is over, and that of `Api` beyond it."""
API_MAX_ONGOING = 1000
"""Number of requests that a replica of `Api` holds at most."""
JSON_LOGS = {"log_level": "INFO", "encoding": "JSON"}


def stop_bound_s(config: ServeConfig) -> float:
    """Return how long a replica of `Api` that is stopped may take, in seconds.

    That is for the requests it has. Each image waits for its trajectory for at most `timeout_s`, and a
    trajectory takes at most `stall_timeout_s`. A replica without requests ends at once.
    """
    return _sampler_stop_bound_s(config) + _ANSWERING_S


def _sampler_stop_bound_s(config: ServeConfig) -> float:
    return config.timeout_s + config.stall_timeout_s + _ANSWERING_S


def build(args: ServeArgs) -> serve.Application:
    """Build the application for a Serve YAML file.

    The file has `import_path: pipelines.serve:build`.
    """
    return make_application(args, JSON_LOGS)


def make_application(args: ServeArgs, logging_config: dict[str, Any]) -> serve.Application:
    """Build the application for `serve.run`.

    Raises:
        ValueError: MLflow is named and has no such registered model, or no champion; or the file of keys
            cannot be read, or has none.
    """
    args = args.resolved()
    by_name = args.by_name()
    for each in by_name.values():
        each.current_version()  # fails here, not on a replica
    config = args.serve
    # Every model of a replica has a queue of its own. All images of a request are queued for a moment before
    # they are handed out.
    at_most = len(by_name) * (config.max_batch_size + config.max_waiting + config.max_images_per_request)
    generation = serve.deployment(
        name=GENERATION_DEPLOYMENT,
        **_replicas(config),
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": int(config.use_gpu)},
        # The replica itself rejects requests when it is full: it knows its queue and how long that will take.
        max_ongoing_requests=at_most,
        max_queued_requests=at_most,
        graceful_shutdown_timeout_s=_sampler_stop_bound_s(config),
        # A model that does not fit its router fits no better the third time.
        max_constructor_retry_count=1,
        # An access log line for every image would repeat `Api`'s line for the request.
        logging_config={**logging_config, "enable_access_log": False},
        **_HEALTH,
    )(GenerationDeployment)
    api = serve.deployment(
        name="Api",
        num_replicas=config.api_replicas,
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=API_MAX_ONGOING,
        max_queued_requests=100,
        graceful_shutdown_timeout_s=stop_bound_s(config),
        logging_config=logging_config,
        **_HEALTH,
    )(serve.ingress(api_builder(config, is_multiplexed=bool(args.models)))())
    return api.bind(generation.bind(args))


def _replicas(config: ServeConfig) -> dict[str, Any]:
    """Return the options that set the number of replicas, or how it is scaled."""
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
    """Build `app` when it is accessed.

    `serve build pipelines.serving.application:app` takes an application, not the function that builds it.
    """
    if name != "app":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return build(ServeArgs.model_validate({}))
