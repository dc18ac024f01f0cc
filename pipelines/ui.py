"""Show the local runs in MLflow's UI, on this machine only.

python -m pipelines.ui          # make ui
"""

import os
import sys
from typing import Annotated

import tyro

from harmonica.validation.settings import Field, settings

from .tracking.mlflow_store import artifacts_of, database_of, tracking_uri, without_credentials


@settings()
class UiCommand:
    """Show the runs of a folder in MLflow's UI until Ctrl-C."""

    storage_path: str = "runs"
    """Folder that holds runs, as given to workflow.py."""
    host: str = "127.0.0.1"
    """Address to listen on; MLflow asks nobody for a password."""
    port: Annotated[int, Field(ge=1, le=65535)] = 5000
    """Port to listen on."""


def server_command(command: UiCommand) -> list[str]:
    """Return the MLflow server's command line.

    Raises:
        ValueError: there is nothing to show, or a server shows it already.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("http"):
        shown = without_credentials(uri)
        raise ValueError(f"MLFLOW_TRACKING_URI is {shown}: open that in a browser, its server has the UI")
    store = database_of(command.storage_path)
    if not uri and not store.exists():
        raise ValueError(
            f"storage_path is {command.storage_path!r}: there are no runs in it yet ({store} is missing), "
            "make some with `python workflow.py` or give the folder that holds them"
        )
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--artifacts-destination", str(artifacts_of(command.storage_path))),
        *("--host", command.host, "--port", str(command.port), "--workers", "1"),
        *("--uvicorn-opts", "--log-level warning"),  # or there would be a line for every request of the page
    ]


def server_environment(command: UiCommand) -> dict[str, str]:
    """Return what the MLflow server's environment has beside this process's own.

    The store's address may hold a password, and all users of the machine see a command line.
    """
    return {"MLFLOW_BACKEND_STORE_URI": tracking_uri(command.storage_path)}


def main() -> None:
    """Serve MLflow's UI until Ctrl-C."""
    command = tyro.cli(UiCommand, description=__doc__)
    try:
        arguments = server_command(command)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"MLflow starts at http://{command.host}:{command.port}. Ctrl-C stops it.", flush=True)
    # Job execution would add seven processes and half a minute, for features not used here.
    quiet = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        # The warning is about MLflow's code, not the user's. Python compares the beginning of a message.
        "PYTHONWARNINGS": "ignore:starlette.middleware.wsgi is deprecated",
    }
    os.execve(sys.executable, arguments, {**quiet, **os.environ, **server_environment(command)})


if __name__ == "__main__":
    main()
