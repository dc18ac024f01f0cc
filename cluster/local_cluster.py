"""A Ray cluster of several nodes on this machine, each with processes and ports of its own, to try things on.

    python cluster/local_cluster.py --workers 2

Says how to reach it, stays until Ctrl-C, and ends just what it started, by process id: `ray stop` would end
other people's clusters on the machine too. In Python:

    with LocalCluster(workers=2) as cluster:
        cluster.nodes[1].kill()  # as if its machine lost power
        cluster.add_node()
"""

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from processes import Session, free_port

_START_S = 120.0  # beside much other work; alone it takes seconds
_STARTED = "Ray runtime started."
_TRIES = 5
# Fixed in Ray 2.60 (its issue 65983): a raylet ends whose agents, which import for 2 s of a core, need
# longer than 15 s. `ray start` does not see that, and waits.
_GAVE_UP = "Timed out waiting for file"


class Node(Session):
    """A `ray start --block`, and so all that it started."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], folder: Path) -> None:
        """
        Args:
            folder: Ray's temporary folder, for the files of this node alone.
        """
        self.folder = folder
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
        super().__init__([*command, f"--temp-dir={folder}"], environment, folder.with_suffix(".log"))

    def wait_started(self) -> bool:
        """Return whether it has started; if not, its raylet has ended.

        Its agents then took longer than the raylet waits for them.

        Raises:
            RuntimeError: it ended, or took too long; with the end of its log.
        """
        self.wait_until(lambda: self._has_started() or self._gave_up(), _START_S, "ray start")
        return self._has_started()

    def _has_started(self) -> bool:
        return _STARTED in self.log.read_text()

    def _gave_up(self) -> bool:
        errors = self.folder.glob("session_*/logs/raylet.err")
        return any(_GAVE_UP in file.read_text(errors="replace") for file in errors)

    def kill_raylet(self) -> None:
        """kill -9 of its raylet alone."""
        (raylet,) = self.pids("raylet/raylet")
        os.kill(raylet, signal.SIGKILL)


class LocalCluster:
    """A head and workers; a context manager."""

    def __init__(
        self,
        *,
        workers: int = 2,
        head_cpus: int = 4,
        worker_cpus: int = 2,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            head_cpus: logical; with none of the workers left it still must do all the work.
            environment: for every node's processes, beside this process's own; none of Ray's is inherited.
        """
        self.workers, self.head_cpus, self.worker_cpus = workers, head_cpus, worker_cpus
        self._ports: list[int] = []
        self._port, self._dashboard, self._count = self._new_port(), self._new_port(), 0
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        python = Path(sys.executable).parent  # for the `python` of a job's entrypoint
        self._environment = inherited | {
            "PATH": f"{python}:{os.environ.get('PATH', os.defpath)}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            # Ray's own is 15, which beside any other work leaves its workers a thirtieth of a core.
            "RAY_worker_niceness": "0",
            "RAY_raylet_start_wait_time_s": f"{_START_S:.0f}",
            # Ray Train's actors look for the dashboard, and else find another cluster's in /tmp/ray.
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self._dashboard}",
            **(environment or {}),
        }
        self.nodes: list[Node] = []
        """The head first."""

    @property
    def environment(self) -> dict[str, str]:
        """What a driver needs to join, with the token."""
        return self._environment | {"RAY_ADDRESS": f"127.0.0.1:{self._port}"}

    def __enter__(self) -> "LocalCluster":
        # Short, since Unix sockets lie in it: their paths have at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        try:
            head = [
                f"--port={self._port}",
                f"--dashboard-port={self._dashboard}",
                "--dashboard-host=127.0.0.1",
            ]
            # No autoscaler: nodes come and go by `add_node` and `kill`.
            head += [f"--ray-client-server-port={self._new_port()}", "--no-monitor"]
            self._start(["--head", *head], self.head_cpus)
            for _ in range(self.workers):  # one by one: together they starve each other on a small machine
                self.add_node()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def add_node(self) -> Node:
        """One more worker."""
        return self._start([f"--address=127.0.0.1:{self._port}"], self.worker_cpus)

    def stop(self) -> None:
        """All nodes, the head last."""
        for node in reversed(self.nodes):
            node.stop()
        self.nodes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _new_port(self) -> int:
        # The kernel may name one twice as long as nothing listens there, and Ray refuses that.
        self._ports.append(free_port(self._ports))
        return self._ports[-1]

    def _start(self, arguments: list[str], cpus: int) -> Node:
        """Start a node, once more if its raylet gives up on its agents, and wait for it."""
        # The job agent's port is a fixed one by default, and there can be one of that on a machine.
        own = [f"--num-cpus={cpus}", f"--dashboard-agent-listen-port={self._new_port()}"]
        own += ["--object-store-memory=200000000", "--disable-usage-stats"]
        for _ in range(_TRIES):
            self._count += 1
            # A folder each: what one node's agent unpacks for a job, another's would delete.
            node = Node([*arguments, *own], self._environment, self.folder / str(self._count))
            self.nodes.append(node)
            if node.wait_started():
                return node
            node.kill()
            self.nodes.remove(node)
        raise RuntimeError(
            f"Ray's agents took longer than its raylet waits for them, 15 s, in {_TRIES} starts of a node: "
            "the machine has too much other work"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="worker nodes beside the head (default 2)")
    parser.add_argument("--head-cpus", type=int, default=4, help="logical CPUs of the head (default 4)")
    parser.add_argument("--worker-cpus", type=int, default=2, help="of each worker (default 2)")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with LocalCluster(
        workers=given.workers, head_cpus=given.head_cpus, worker_cpus=given.worker_cpus
    ) as cluster:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            print(f"export {name}={cluster.environment[name]}")
        print("# up until Ctrl-C; process ids:", *(node.process.pid for node in cluster.nodes), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
