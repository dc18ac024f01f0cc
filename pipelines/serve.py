"""Ray Serve: an HTTP endpoint in the shape of OpenAI's Images API that samples under the champion router.

    python -m pipelines.serve --serve.port 8000        # make serve
    serve deploy with import_path: pipelines.serve:build

Two deployments: `Api` speaks HTTP, `Sampler` holds the model and draws. A request for n images is n
orders, which share trajectories with whatever other requests wait.
"""

import json
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import tyro
from ray import serve

from harmonica.builtin import CHAMPION as BUILTIN_CHAMPION
from harmonica.models.loading import ModelConfig
from harmonica.paths import local
from pipelines import registry
from pipelines.cluster_address import check_address
from pipelines.config import WorkflowConfig
from pipelines.mlflow_store import database_of
from pipelines.mlflow_store import tracking_uri as local_tracking_uri
from pipelines.runtime import connect, is_private
from pipelines.serving import proxy
from pipelines.serving.application import JSON_LOGS, make_application
from pipelines.serving.application import build as build
from pipelines.serving.following import FOLLOW_S, ServeArgs
from pipelines.serving.serve_config import ServeConfig

APP_NAME = "harmonica"
_READY_TIMEOUT_S = 60.0
_DRAW_TIMEOUT_S = 600.0


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
    """What a replica raised; Serve's own error only names the deployment."""
    application = serve.status().applications.get(APP_NAME)
    messages = [deployment.message for deployment in application.deployments.values()] if application else []
    lines = [line for message in messages for line in message.splitlines()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    return raised[-1] if raised else ""


def _is_serving() -> bool:
    return bool(serve.status().proxies)


def check_port(config: ServeConfig) -> None:
    """Refuse an address that cannot be listened on.

    Raises:
        ValueError: taken, or not this machine's.
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


def first_image(url: str, prompt: str, seed: int) -> dict[str, Any]:
    """One image from a running endpoint: the decoded answer. Waits while the endpoint starts or is busy.

    Raises:
        RuntimeError: refused, or not reachable for a minute.
    """
    deadline = time.monotonic() + _READY_TIMEOUT_S
    reason: object = None
    while time.monotonic() < deadline:
        try:
            answer = httpx.post(
                f"{url}/v1/images/generations", json={"prompt": prompt, "seed": seed}, timeout=_DRAW_TIMEOUT_S
            )
        except httpx.TransportError as error:
            reason = error
        else:
            if answer.is_success:
                return answer.json()
            reason = answer.text
            if answer.status_code not in (404, 503):
                break
        time.sleep(0.5)
    raise RuntimeError(f"{url} gave no image of {prompt!r}: {reason}")


@dataclass(frozen=True, kw_only=True, slots=True)
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
    """Router artifact folder to serve. Empty: the registry's champion, else the built-in one."""


def _choose_router(command: ServeCommand) -> tuple[str, str, str]:
    """(tracking URI, artifact folder, which it is in words); one of the first two is empty."""
    if command.router:
        router = str(local(command.router, "router"))
        return "", router, f"the router in {router}"
    if not (os.environ.get("MLFLOW_TRACKING_URI") or database_of(command.storage_path).exists()):
        return "", str(BUILTIN_CHAMPION), "the built-in champion (no MLflow store yet)"
    uri = local_tracking_uri(command.storage_path)
    try:
        version = registry.resolve(command.registered_model, registry.CHAMPION, uri)
    except ValueError as error:
        return "", str(BUILTIN_CHAMPION), f"the built-in champion ({error})"
    return uri, "", f"version {version} of {command.registered_model}, the champion in MLflow"


def _curl(url: str) -> str:
    """A command that draws the model's first class, or a prompt, into image.png."""
    card = httpx.get(f"{url}/v1/models", timeout=10).json()["data"][0]
    prompt = card["class_names"][0] if card["class_names"] else "a photo of a sneaker"
    body = shlex.quote(json.dumps({"prompt": prompt, "seed": 1}))
    decode = "import base64, json, sys; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)"
    return (
        f"  curl -s {url}/v1/images/generations -H 'Content-Type: application/json' -d {body} \\\n"
        f'    | python3 -c \'{decode}["data"][0]["b64_json"]))\' > image.png'
    )


def main() -> None:
    command = tyro.cli(ServeCommand, description=__doc__)
    try:
        check_address()
        uri, router, words = _choose_router(command)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"Starting with {words} ...", flush=True)
    stop = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.set())
    connect()
    try:
        url = deploy(
            command.serve,
            command.model,
            registered_model=command.registered_model,
            tracking_uri=uri,
            router=router,
        )
        print(
            f"Serving at {url}, documentation at {url}/docs. Try:\n\n{_curl(url)}\n\nCtrl-C stops it.",
            flush=True,
        )
        stop.wait()
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    finally:
        shutdown()


if __name__ == "__main__":
    main()
