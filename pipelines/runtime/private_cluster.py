"""A Ray cluster of this process alone, on the loopback address."""

import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray
from ray._private import ray_constants

logger = logging.getLogger(__name__)

_PRIVATE = {
    # A private cluster loses no node, so the actor that watches for that is left out.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # The raylet waits up to 15 s for the agents' files, one after the other; Ray's own 30 s may be too short.
    "RAY_raylet_start_wait_time_s": "45",
}
_TRIES = 4
_TIMED_OUT = "timed out during startup"
_NEEDED = (ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_RAYLET)
_TOKEN_ELSEWHERE = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_DASHBOARD_ADDRESS = "RAY_API_SERVER_ADDRESS"
_DASHBOARD_PORTS = range(8265, 8315)
# Two training workers, a Serve replica and Ray Data's tasks must fit side by side: with only as many
# logical CPUs as workers, Data starves and training waits for ever without an error.
MIN_LOGICAL_CPUS = 6


def start_private_cluster() -> None:
    """Start one, and join it."""
    for name, value in _PRIVATE.items():
        os.environ.setdefault(name, value)
    close_token()
    port = _dashboard_port()
    told = _told_to_workers(_DASHBOARD_ADDRESS, f"http://127.0.0.1:{port}")
    with told, on_loopback() as address:
        _start(address, port)


def close_token() -> None:
    """Make the file of Ray's token readable by its owner alone.

    Ray makes it for all users to read, and whoever has it can run code in a cluster: the loopback address is
    every user's of the machine.
    """
    if (
        any(os.environ.get(name) for name in _TOKEN_ELSEWHERE)
        or os.environ.get("RAY_AUTH_MODE") == "disabled"
    ):
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        if path.exists():
            path.chmod(0o600)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as whole:  # for its owner alone
            whole.write(secrets.token_hex(32))
            whole.flush()
            os.link(whole.name, path)  # which replaces none that another process has made meanwhile
    except FileExistsError:
        pass
    except OSError as error:
        logger.warning("%s may be readable by other users of this machine (%s)", path, error.strerror)


def logical_cpus() -> int:
    """Return the number of CPUs that a private cluster has.

    There may be more than cores.
    """
    return max(MIN_LOGICAL_CPUS, os.cpu_count() or 1)


def has_ended() -> bool:
    """Return whether this process's cluster has ended, which then answers no more.

    That happens where all processes of a service or a job get a signal, and not this one alone.
    """
    node = ray._private.worker._global_node
    return node is not None and any(kind in _NEEDED for kind, _ in node.dead_processes())


def _start(address: str, dashboard_port: int) -> None:
    """Start the cluster, and once more if its node does not come up.

    A raylet ends whose agents need longer than 15 s for their imports, a limit that is fixed in Ray 2.60 (its
    issue 65983) and that a small machine with other work does not always keep.

    Raises:
        RuntimeError: none of the starts has succeeded.
    """
    for attempt in range(1, _TRIES + 1):
        before = _ray_processes()
        try:
            ray.init(
                address="local",
                num_cpus=logical_cpus(),
                object_store_memory=500_000_000,
                # Ray Data asks its state API about tasks that seem to hang.
                include_dashboard=True,
                dashboard_host=address,
                dashboard_port=dashboard_port,
                _node_ip_address=address,
                logging_level=logging.WARNING,
            )
            return
        except Exception as error:  # Ray raises no class of its own here
            if _TIMED_OUT not in str(error):
                raise
            _kill(_ray_processes() - before)
            if attempt < _TRIES:
                logger.warning("Ray's node was too slow to start beside other work; starting it once more")
    raise RuntimeError(
        f"a Ray cluster did not start on this machine in {_TRIES} tries, since its agents took "
        "longer than Ray's limit of 15 s: end other work that keeps the cores busy"
    )


def _ray_processes() -> set[psutil.Process]:
    """Return the processes below this one that are Ray's."""
    folder, found = str(Path(ray.__file__).parent), set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            if folder in command or command.startswith("ray"):
                found.add(process)
    return found


def _kill(processes: set[psutil.Process]) -> None:
    """Kill what a failed start has left, which would keep the dashboard's port."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def _dashboard_port() -> int:
    """Return the first free port of those that Ray itself would try.

    The port is known before the dashboard starts.
    """
    for port in _DASHBOARD_PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(
        f"no port from {_DASHBOARD_PORTS[0]} to {_DASHBOARD_PORTS[-1]} is free for Ray's dashboard"
    )


@contextmanager
def _told_to_workers(name: str, value: str) -> Iterator[None]:
    """Set an environment variable while a cluster starts, for its processes.

    What uses Ray's state API, as Ray Data does about tasks that seem to hang, asks the dashboard. Without an
    address it would ask the cluster that a file in Ray's temporary folder names, which may be another one, or
    one that was killed.
    """
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def on_loopback() -> Iterator[str]:
    """Make servers started inside listen on the loopback address, and yield it.

    Ray's servers (GCS, raylet, workers, agents) do so where the node's address is 127.0.0.1. Ray however puts
    an address of the network in its place, unless it believes that clusters are impossible here, as on macOS.
    gloo and NCCL take the interface whose name they are given.
    """
    address = "127.0.0.1"
    if name := _interface_of(address):
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", name)  # the cluster's processes inherit it
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield address
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _interface_of(address: str) -> str:
    """Return the network interface that has this IPv4 address; "" if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.family == socket.AF_INET and one.address == address for one in addresses):
            return str(name)
    return ""
