"""Serve an HTTP endpoint in the shape of OpenAI's Images API, on Ray Serve.

    python -m pipelines.serve --serve.port 8000        # make serve
    python -m pipelines.serve --models models.yaml     # several models
    serve deploy with import_path: pipelines.serve:build

It samples under the champion router. There are two deployments: `Api` serves HTTP, and `Sampler` holds the
models and generates. A request for n images is split into n requests to the engine, which share batches with
those of other clients.
"""

import signal
import sys
import threading
from dataclasses import field

from harmonica.cli.common import fail, parse_settings, say
from harmonica.models.loading import ModelConfig
from harmonica.validation.settings import settings

from .config.serve import ServeConfig
from .config.workflow import WorkflowConfig
from .run_state.interruption import Terminated, sigterm_raises
from .runtime.cluster_address import check_address
from .runtime.ray_runtime import connect, is_private
from .runtime.resources import needs_of_endpoint, refuse_unmet
from .serving.application import build as build
from .serving.auth import key_headers
from .serving.client import curl_command
from .serving.lifecycle import check_port, deploy_args, shutdown
from .serving.router_choice import choose_routers
from .serving.serve_args import FOLLOW_S, ServeArgs, read_models


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
    """Router artifact folder to serve, `uncached` to compute every branch, or `even-1.8x` for evenly spread
    steps at that speed, which need no training. Empty: the registry's champion, else the built-in one,
    whichever fits the model."""
    models: str = ""
    """YAML file of several models to serve, by the names that clients give: `NAME: {model: {path: PATH}}`,
    with `registered_model` (NAME by default) and `router` where they are not to be found by themselves.
    Empty: the one of the settings above."""


@sigterm_raises()
def _serve(command: ServeCommand) -> None:
    """Serve until SIGINT or SIGTERM. Settings are checked before Ray starts.

    Raises:
        ValueError: the settings cannot be used.
        RuntimeError: serving could not be started.
    """
    models = read_models(command.models) if command.models else {}
    args = ServeArgs(
        serve=command.serve,
        model=command.model,
        registered_model=command.registered_model,
        follow_s=FOLLOW_S,
        router=command.router,
        models=models,
    )
    headers = key_headers(command.serve.api_keys_file)
    check_address()
    if is_private():
        check_port(command.serve)
        refuse_unmet(needs_of_endpoint(command.serve))
    args, summary = choose_routers(args, command.storage_path)
    say(f"Starting with {summary} ...")
    connect()
    stop, hurry = threading.Event(), threading.Event()

    def on_signal(number: int, _: object) -> None:
        # `timeout` sends SIGTERM twice, and means one.
        if number == signal.SIGINT and stop.is_set():
            hurry.set()
        stop.set()

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, on_signal)
    try:
        url = deploy_args(args)
        words = ", with one of the server's keys in HARMONICA_API_KEY" if headers else ""
        say(f"Serving at {url}, documentation at {url}/docs. Try{words}:\n\n{curl_command(url, headers)}\n")
        say("Ctrl-C stops it.")
        stop.wait()
        say("Requests in progress are answered first; Ctrl-C once more gives them up.")
    finally:
        stop.set()
        shutdown(command.serve, is_hurried=hurry.is_set)


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
