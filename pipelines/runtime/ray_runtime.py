"""Connect to a Ray cluster: join one, or start one for this process alone."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from harmonica.validation.finite import NotFinite

from ..run_state.interruption import kept_sigterm
from ..run_state.storage import ENDPOINT
from .cluster_address import check_address, cluster_address
from .log_filters import drop_remarks
from .private_cluster import start_private_cluster

logger = logging.getLogger(__name__)

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Training's workers stay where they are started: a relative path is the same everywhere.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Two cores need longer than half a minute to start a replica beside everything else.
    "RAY_SERVE_SLOW_STARTUP_WARNING_S": "180",
    # Serve ends a proxy that takes longer to start and starts another, which takes as long again.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
_LOUD = {
    "ray.data": logging.ERROR,
    "ray.train": logging.WARNING,
    "ray.serve": logging.WARNING,
    "mlflow": logging.WARNING,
}


def quiet_libraries() -> None:
    """Keep the libraries' routine messages off this process's terminal.

    Warnings stay.
    """
    for name, level in _LOUD.items():
        logging.getLogger(name).setLevel(level)
    # MLflow sets the levels of its own loggers when it is imported, which may be later.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # Ray Train has a line for every report, by a logger that is named after its file.
    files = str(Path(ray.__file__).parent / "train")
    for name in [name for name in logging.root.manager.loggerDict if name.startswith(files)]:
        logging.getLogger(name).setLevel(logging.WARNING)


def connect(endpoint: str = "") -> None:
    """Join the cluster of `RAY_ADDRESS`, or start a private local one.

    `ray job submit` sets that variable.

    A private cluster listens on the loopback address alone, and is closed by a token: where the environment
    names none, Ray makes one itself and keeps it in `~/.ray/auth_token`.

    Args:
        endpoint: of an S3 store, for the workers of a joined cluster; a private one's inherit it.

    Raises:
        ValueError: the cluster cannot be joined, as in `check_address`.
    """
    if ray.is_initialized():
        return
    check_address()  # Ray itself goes on trying for more than a minute, without a word
    quiet_libraries()
    drop_remarks()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if cluster_address():
        # Only what is no secret: a runtime environment is shown on the dashboard.
        shared = {"env_vars": {ENDPOINT: endpoint}} if endpoint else None
        with kept_sigterm():  # Ray's own handler exits with code 15 and no message
            ray.init(logging_level=logging.WARNING, runtime_env=shared)
        return
    with kept_sigterm():
        start_private_cluster()


@contextmanager
def plainly() -> Iterator[None]:
    """Re-raise a worker's `NotFinite` as itself, without Ray's traceback around it."""
    try:
        yield
    except Exception as error:
        found: BaseException | None = error
        while found is not None:
            # A task's error has its own in `cause`, what Ray Data raises in the usual place.
            inner = getattr(found, "cause", None) or found.__cause__
            if isinstance(found, NotFinite) and not isinstance(inner, NotFinite):
                raise NotFinite(str(found)) from None
            found = inner
        raise


def is_private() -> bool:
    """Return whether the cluster is this process's own and ends with it."""
    return not cluster_address()


def node_names() -> dict[str, str]:
    """Return the names of all nodes by id.

    A name is the host's, extended if the host has several nodes.
    """
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    several = {host for host, count in Counter(hosts.values()).items() if count > 1}
    return {one: f"{host}-{one[:8]}" if host in several else host for one, host in hosts.items()}
