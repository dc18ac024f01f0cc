"""Ray Serve: an HTTP endpoint in the shape of OpenAI's Images API that samples under the champion router.

    python -m pipelines.serve --serve.port 8000        # make serve
    serve deploy with import_path: pipelines.serve:build

There are two deployments: `Api` serves HTTP, and `Sampler` holds the model and generates. A request for n
images is split into n requests to the engine, which share batches with those of other clients.
"""

import json
import re
import shlex
import signal
import socket
import sys
import threading
import time
from dataclasses import field
from typing import Any

import httpx
from ray import serve

from harmonica.cli.common import fail, parse_settings, say
from harmonica.models.loading import ModelConfig
from harmonica.validation.settings import settings

from .config.serve import ServeConfig
from .config.workflow import WorkflowConfig
from .runtime.cluster_address import check_address
from .runtime.ray_runtime import Terminated, connect, is_private
from .serving import proxy
from .serving.application import JSON_LOGS, make_application
from .serving.application import build as build
from .serving.auth import key_headers
from .serving.registry_watcher import FOLLOW_S, ServeArgs
from .serving.router_choice import choose_router

APP_NAME = "harmonica"
_READY_TIMEOUT_S = 60.0
_GENERATE_TIMEOUT_S = 600.0


def deploy(
    config: ServeConfig,
    model: ModelConfig,
    *,
    registered_model: str,
    tracking_uri: str = "",
    router: str = "",
    follow_s: float = FOLLOW_S,
) -> str:
    """Serve on the connected cluster until `shutdown`, replacing what it served; returns the URL.

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
    # On a private cluster every log line lands on the user's terminal; on a shared one, in Ray's files.
    logging_config = {"log_level": "WARNING"} if is_private() else JSON_LOGS
    application = make_application(args, logging_config)
    if not _is_serving():
        check_port(config)
    serve.start(
        http_options={"host": config.host, "port": config.port},
        # Inherited by the proxies, and the working directory with it.
        controller_options={"runtime_env": {"env_vars": {proxy.CALLBACK: f"{proxy.__name__}.middlewares"}}},
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


def shutdown() -> None:
    """Stop serving. The cluster stays, and so do other applications on it."""
    if APP_NAME in serve.status().applications:
        serve.delete(APP_NAME)
    if not serve.status().applications:
        serve.shutdown()


def _why_failed() -> str:
    """Return the error that a replica raised; Serve's own only names the deployment."""
    application = serve.status().applications.get(APP_NAME)
    messages = [deployment.message for deployment in application.deployments.values()] if application else []
    lines = [line for message in messages for line in message.splitlines()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    return raised[-1] if raised else ""


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


def first_image(url: str, prompt: str, seed: int, *, api_keys_file: str = "") -> dict[str, Any]:
    """Ask a running endpoint for one image, waiting while it starts or is busy; return the decoded answer.

    Args:
        api_keys_file: the endpoint's own `serve.api_keys_file`; its first key is used.

    Raises:
        RuntimeError: the request is rejected, or the endpoint cannot be reached for a minute.
    """
    deadline = time.monotonic() + _READY_TIMEOUT_S
    endpoint, headers = f"{url}/v1/images/generations", key_headers(api_keys_file)
    reason: object = None
    while time.monotonic() < deadline:
        try:
            body = {"prompt": prompt, "seed": seed}
            answer = httpx.post(endpoint, json=body, headers=headers, timeout=_GENERATE_TIMEOUT_S)
        except httpx.TransportError as error:
            reason = error
        else:
            if answer.is_success:
                answered: dict[str, Any] = answer.json()
                return answered
            reason = answer.text
            if answer.status_code not in (404, 503):
                break
        time.sleep(0.5)
    raise RuntimeError(f"{url} gave no image of {prompt!r}: {reason}")


@settings()
class ServeCommand:
    """Serve images over HTTP until Ctrl-C."""

    serve: ServeConfig = field(default_factory=ServeConfig)
    """Endpoint."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The denoiser."""
    registered_model: str = WorkflowConfig().registered_model
    """Name in MLflow's registry."""
    storage_path: str = "runs"
    """Folder whose mlflow.db is looked into where MLFLOW_TRACKING_URI is not set."""
    router: str = ""
    """Router artifact folder to serve, or `uncached` to compute every branch. Empty: the registry's champion,
    else the built-in one, whichever fits the model."""


def _curl(url: str, headers: dict[bytes, bytes]) -> str:
    """Return a shell command that writes an image of the model's first class, or of a prompt, to image.png.

    Args:
        headers: with a key, if the endpoint needs one.
    """
    card = httpx.get(f"{url}/v1/models", headers=headers, timeout=10).json()["data"][0]
    prompt = card["class_names"][0] if card["class_names"] else "a photo of a sneaker"
    body = shlex.quote(json.dumps({"prompt": prompt, "seed": 1}))
    decode = "import base64, json, sys; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)"
    key = ' -H "Authorization: Bearer $HARMONICA_API_KEY"' if headers else ""
    return (
        f"  curl -s {url}/v1/images/generations{key} -H 'Content-Type: application/json' -d {body} \\\n"
        f'    | python3 -c \'{decode}["data"][0]["b64_json"]))\' > image.png'
    )


def _serve(command: ServeCommand) -> None:
    """Serve until SIGINT or SIGTERM. Settings are checked before Ray starts.

    Raises:
        ValueError: the settings cannot be used.
        RuntimeError: serving could not be started.
    """
    headers = key_headers(command.serve.api_keys_file)
    check_address()
    if is_private():
        check_port(command.serve)
    choice = choose_router(command.model, command.router, command.registered_model, command.storage_path)
    say(f"Starting with {choice.summary} ...")
    connect()
    stop = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):  # after `connect`, which has its own for the latter
        signal.signal(name, lambda *_: stop.set())
    try:
        url = deploy(
            command.serve,
            command.model,
            registered_model=command.registered_model,
            tracking_uri=choice.tracking_uri,
            router=choice.router,
        )
        words = ", with one of the server's keys in HARMONICA_API_KEY" if headers else ""
        say(f"Serving at {url}, documentation at {url}/docs. Try{words}:\n\n{_curl(url, headers)}\n")
        say("Ctrl-C stops it.")
        stop.wait()
    finally:
        shutdown()


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code.

    It is 0 once serving was stopped, 1 if it could not be started, 2 for unusable input, and 128 + signal if
    starting was interrupted.
    """
    try:
        _serve(parse_settings(ServeCommand, arguments, f"python -m {__package__}.serve"))
    except ValueError as error:
        return fail(error, code=2)
    except RuntimeError as error:
        return fail(str(error), code=1)
    except KeyboardInterrupt as interrupt:
        return fail("interrupted while starting", code=143 if isinstance(interrupt, Terminated) else 130)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
