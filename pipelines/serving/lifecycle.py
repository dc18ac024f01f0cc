"""Start the endpoint on the connected Ray cluster, wait for it, and stop it."""

import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import httpx
from ray import serve

from harmonica.models.loading import ModelConfig

from ..config.serve import ServeConfig
from ..runtime.private_cluster import has_ended
from ..runtime.ray_runtime import is_private
from . import proxy
from .application import JSON_LOGS, make_application, stop_bound_s
from .deployments import GENERATION_DEPLOYMENT
from .serve_args import FOLLOW_S, ServeArgs

APP_NAME = "harmonica"
SERVE_ENVIRONMENT = {
    proxy.CALLBACK: f"{proxy.__name__}.middlewares",
    # One that hangs would keep its place for as long as a stopped one may take for its requests.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}
"""Environment of Serve's controller and of its proxies."""
_NO_CARD = "ASGI lifespan startup failed"
"""Serve's words for a replica of `Api` that got no model card."""
_EXCEPTION = re.compile(r"[\w.]*(Error|Exception): ")
_READY_TIMEOUT_S = 60.0
_ENDING_S = 10.0  # of a cluster whose actors have ended already
_POLL_S = 0.2
_STOP_SLACK_S = 30.0  # beyond what Serve itself allows a replica


def deploy(
    config: ServeConfig,
    model: ModelConfig,
    *,
    registered_model: str,
    tracking_uri: str = "",
    router: str = "",
    follow_s: float = FOLLOW_S,
) -> str:
    """Serve one model on the connected cluster until `shutdown`, and return the URL.

    An endpoint that it served before is replaced.

    Raises:
        ValueError: the port is taken, or the router cannot be found.
        RuntimeError: a replica could not start (the message says why), or the URL does not answer.
    """
    args = ServeArgs(
        serve=config,
        model=model,
        registered_model=registered_model,
        tracking_uri=tracking_uri,
        router=router,
        follow_s=follow_s,
    )
    return deploy_args(args)


def deploy_args(args: ServeArgs) -> str:
    """Serve one model or several, as `deploy` does one.

    Raises:
        ValueError: the port is taken, or a router cannot be found.
        RuntimeError: a replica could not start (the message says why), or the URL does not answer.
    """
    config = args.serve
    # On a private cluster every log line lands on the user's terminal; on a shared one, in Ray's files.
    logging_config = {"log_level": "WARNING"} if is_private() else JSON_LOGS
    application = make_application(args, logging_config)
    if not _is_serving():
        check_port(config)
    serve.start(
        http_options={"host": config.host, "port": config.port},
        # Inherited by the proxies, and the working directory with it.
        controller_options={"runtime_env": {"env_vars": SERVE_ENVIRONMENT}},
        logging_config=logging_config,
    )
    try:
        serve.run(application, name=APP_NAME, route_prefix="/", logging_config=logging_config)
    except RuntimeError as error:
        raise RuntimeError(f"serving could not start: {_why_failed() or error}") from error
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    url = f"http://{host}:{config.port}"
    _wait_until_ready(url)
    return url


def shutdown(config: ServeConfig | None = None, *, is_hurried: Callable[[], bool] = lambda: False) -> None:
    """Stop serving, once the requests in progress are answered. The cluster stays.

    So do other applications on it. A private cluster may end meanwhile, by a signal that its processes got
    too, as systemd and `timeout` send it: then there is nothing left to stop, and Ray would wait a minute.

    Args:
        config: the endpoint's settings, which bound how long its requests may take. Default: the defaults.
        is_hurried: asked meanwhile; once it returns True, no request is waited for any more.

    Raises:
        RuntimeError: Serve has not stopped the endpoint within the bound.
    """
    bound_s = stop_bound_s(config or ServeConfig()) + _STOP_SLACK_S
    outcome: Future[None] = Future()
    threading.Thread(target=_stop, args=[outcome, bound_s], daemon=True).start()
    while not (outcome.done() or has_ended() or is_hurried()):
        time.sleep(0.1)
    if outcome.done():
        outcome.result()


def _stop(outcome: "Future[None]", bound_s: float) -> None:
    try:
        _stop_serving(bound_s)
        outcome.set_result(None)
    except Exception as error:
        if is_private():
            time.sleep(_ENDING_S)
        outcome.set_exception(error)


def _stop_serving(bound_s: float) -> None:
    deadline = time.monotonic() + bound_s
    if APP_NAME in serve.status().applications:
        serve.delete(APP_NAME, _blocking=False)  # which else gives up after 60 s
    while APP_NAME in serve.status().applications:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"the endpoint has not stopped within {bound_s:g} s, which its requests may take by "
                "serve.timeout_s and serve.stall_timeout_s: end it with `serve shutdown`"
            )
        time.sleep(_POLL_S)
    if not serve.status().applications:
        serve.shutdown()


def _why_failed() -> str:
    """Return the error that a replica raised; Serve's own only names the deployment.

    If `Api` has failed for want of `Sampler` alone, it waits for the outcome of `Sampler`.
    """
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while True:
        application = serve.status().applications.get(APP_NAME)
        deployments = application.deployments if application else {}
        reason = failure_reason({name: deployment.message for name, deployment in deployments.items()})
        generation = deployments.get(GENERATION_DEPLOYMENT)
        is_starting = generation is not None and generation.status == "UPDATING"
        if _NO_CARD not in reason or not is_starting or time.monotonic() > deadline:
            return reason
        time.sleep(0.2)


def failure_reason(messages: Mapping[str, str]) -> str:
    """Return the error that explains the others in Serve's messages on deployments.

    `Api` asks `Sampler` for the model card when it starts. If its replica has heard that `Sampler` cannot
    start before it asks, it fails too, and of that Serve says only that the ASGI lifespan failed. An error of
    `Sampler` therefore goes before one of `Api`.

    Args:
        messages: by name of the deployment; "" for one that has not failed.

    Returns:
        The last line that names an exception, such as "ValueError: ..."; "" if there is none.
    """
    for name in sorted(messages, key=lambda name: name != GENERATION_DEPLOYMENT):
        raised = [line for line in messages[name].splitlines() if _EXCEPTION.match(line)]
        if raised:
            return raised[-1]
    return ""


def _is_serving() -> bool:
    return bool(serve.status().proxies)


def check_port(config: ServeConfig) -> None:
    """Check that the address can be listened on.

    Raises:
        ValueError: it is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ValueError(
                f"serve.port is {config.port}: {config.host}:{config.port} cannot be listened on "
                f"({error.strerror}), give another port"
            ) from error


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while True:
        try:
            if httpx.get(f"{url}/healthz", timeout=10).is_success:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{url} does not answer: if Serve already runs on this cluster at another host or port, it "
                "keeps that (stop it with `serve shutdown`)"
            )
        time.sleep(0.2)
