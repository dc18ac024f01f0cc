"""Joining a Ray cluster, or starting a private one on this machine."""

import logging
import os
import signal
import threading
from collections import Counter
from pathlib import Path

import ray

from pipelines.cluster_address import check_address, cluster_address
from pipelines.storage import ENDPOINT

logger = logging.getLogger(__name__)

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Two training workers, a Serve replica and Ray Data's tasks must fit side by side: with only as many
# logical CPUs as workers, Data starves and training waits for ever without an error.
MIN_LOGICAL_CPUS = 6


_LOUD = {
    "ray.data": logging.ERROR,
    "ray.train": logging.WARNING,
    "ray.serve": logging.WARNING,
    "mlflow": logging.WARNING,
}


def quiet_libraries() -> None:
    """Keep the libraries' routine messages off the terminal, in this process; warnings stay."""
    for name, level in _LOUD.items():
        logging.getLogger(name).setLevel(level)
    # Ray Train has a line for every report, by a logger that is named after its file.
    files = str(Path(ray.__file__).parent / "train")
    for name in [name for name in logging.root.manager.loggerDict if name.startswith(files)]:
        logging.getLogger(name).setLevel(logging.WARNING)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as `ray job stop` and Kubernetes send it: to be met like Ctrl-C."""


def _terminate(*_: object) -> None:
    raise Terminated


def _settle_sigterm() -> None:
    """Ray's own handler ends the process with exit code 15 and no word."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)


def connect(endpoint: str = "") -> None:
    """Join the cluster of `RAY_ADDRESS` (set by `ray job submit`), else start a private local one.

    A private cluster is closed by a token: where the environment names none, Ray makes one itself
    and keeps it in `~/.ray/auth_token`.

    Args:
        endpoint: of an S3 store, for the workers of a joined cluster; a private one's inherit it.

    Raises:
        ValueError: as of `check_address`.
    """
    if ray.is_initialized():
        return
    check_address()  # Ray itself goes on trying for more than a minute, without a word
    quiet_libraries()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if cluster_address():
        # Only what is no secret: a runtime environment is shown on the dashboard.
        shared = {"env_vars": {ENDPOINT: endpoint}} if endpoint else None
        ray.init(logging_level=logging.WARNING, runtime_env=shared)
        _settle_sigterm()
        return
    ray.init(
        address="local",
        num_cpus=max(MIN_LOGICAL_CPUS, os.cpu_count() or 1),
        object_store_memory=500_000_000,
        # Ray Train asks the dashboard's state API for its controller, and complains where there is none.
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        logging_level=logging.WARNING,
    )
    _settle_sigterm()


def is_private() -> bool:
    """Whether the cluster is this process's own and ends with it."""
    return not cluster_address()


def node_names() -> dict[str, str]:
    """Of every node, by its id: the host's name, and more where it has several nodes."""
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    several = {host for host, count in Counter(hosts.values()).items() if count > 1}
    return {one: f"{host}-{one[:8]}" if host in several else host for one, host in hosts.items()}
