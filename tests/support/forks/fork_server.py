"""Processes that tests with clusters start, as forks of one that has imported PyTorch and other libraries.

A chain with Ray has 40 workers, and each of them imports for 2 to 9 seconds of a core, which is most of what
such tests would take (tests/benchmarks/RESULTS.md). Nothing of Ray, of `harmonica` or of `pipelines` is
imported beforehand: those are found and set up as in a process that is started plainly. `pytest --no-forks`
has only such processes, and so has the demo's test.

    python fork_server.py SOCKET

Beside the socket it keeps a file for each client, named by its process id, with the id of the fork.
"""

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from fork_client import ACCEPTED, DECLINED

LIBRARIES = (
    *("numpy", "pandas", "pyarrow.dataset", "torch", "timm.layers", "torchmetrics", "diffusers"),
    *("mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store", "matplotlib.figure", "PIL.Image"),
    *("s3fs", "aiohttp", "fastapi", "pydantic"),
)
READ_AT_IMPORT = (
    *("ATEN", "CUDA", "DNNL", "KMP_", "LD_", "MKL", "ONEDNN", "PYTORCH", "TORCH"),
    *("DIFFUSERS", "HF_", "HUGGINGFACE", "TRANSFORMERS", "XDG_"),
    *("PYTHONDEVMODE", "PYTHONHASHSEED", "PYTHONOPTIMIZE", "PYTHONWARNINGS"),
)
"""How the environment variables begin that these libraries or Python read when they are imported.

A worker with others than the server has is not forked. Ray sets OMP_NUM_THREADS to a worker's number of CPUs;
a fork has the server's, which is 1.
"""
READ_LATER = ("HF_HUB_DISABLE_PROGRESS_BARS", "TORCHINDUCTOR_CACHE_DIR")
"""Set by ourselves and by torch's compiler for processes that they start; the server has no bars either."""


def read_at_import(environment: dict[str, str]) -> dict[str, str]:
    found = {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}
    return {name: value for name, value in found.items() if name not in READ_LATER}


@dataclass
class Process:
    """What a fork has to become: the client's command line, import path, environment and folder."""

    runs: list[str]
    path: list[str]
    prefix: str
    environment: dict[str, str]
    folder: str
    ignored: list[int]

    def run(self, streams: list[int]) -> None:
        """Run the script or module in this process, as `python SCRIPT` or `python -m MODULE` does."""
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in self.ignored:
            signal.signal(number, signal.SIG_IGN)
        import_module("numpy").random.seed()  # Python's own generator does this itself
        is_module = self.runs[0] == "-m"
        script = os.path.abspath(self.runs[0])
        first = self.folder if is_module else os.path.dirname(script)
        sys.path[:] = dict.fromkeys([first, *self.path])
        sys.argv = self.runs[1:] if is_module else self.runs
        if is_module:
            runpy.run_module(self.runs[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")


class Server:
    """Accept clients, fork for them, and pass signals and exits between the two."""

    def __init__(self, address: str) -> None:
        self._folder = Path(address).parent
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(address)
        self._listener.listen(128)
        self._waker, self._woken = socket.socketpair()
        for end in (self._waker, self._woken):
            end.setblocking(False)
        self._forks: dict[socket.socket, int] = {}
        self._environment = read_at_import(dict(os.environ))
        self._ends = False

    def serve(self) -> tuple[Process, list[int]] | None:
        """Go on until SIGTERM or the parent's end, which is that of all forks.

        In a fork, return what it has to become, and its streams.
        """
        parent = os.getppid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end this process
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        while not self._ends and os.getppid() == parent:
            ready, _, _ = select.select([self._listener, self._woken, *self._forks], [], [], 1)
            for one in ready:
                if one is self._woken:
                    with contextlib.suppress(BlockingIOError):
                        one.recv(4096)
                elif one is not self._listener:
                    self._pass_on(one)
                elif (become := self._accept()) is not None:
                    return become
            self._reap()
        for pid in self._forks.values():
            _send_signal(pid, signal.SIGKILL)
        return None

    def _end(self, *_: object) -> None:
        self._ends = True

    def _accept(self) -> tuple[Process, list[int]] | None:
        client, _ = self._listener.accept()
        client.settimeout(10)
        streams: list[int] = []
        try:
            head, streams, _, _ = socket.recv_fds(client, 8, 3)
            process = Process(**json.loads(_exactly(client, int.from_bytes(head, "little"))))
            if process.prefix != sys.prefix or read_at_import(process.environment) != self._environment:
                client.sendall(DECLINED)
                return None
            client.sendall(ACCEPTED)
            if (pid := os.fork()) == 0:
                self._leave()
                client.close()
                kept, streams = streams, []
                return process, kept
            self._forks[client] = pid
            self._record(client).write_text(str(pid))
        except (OSError, ValueError, TypeError):  # a client that was killed meanwhile
            pass
        finally:
            for stream in streams:
                os.close(stream)
            if client not in self._forks:
                client.close()
        return None

    def _leave(self) -> None:
        """In a fork: be no server any more, nor in its process group: Ray kills a worker's as a whole.

        Its session stays the server's: Linux shares the cores out among sessions first, and with one each the
        forks of one cluster would starve the start of another.
        """
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for one in (self._listener, self._waker, self._woken, *self._forks):
            one.close()
        self._forks.clear()

    def _pass_on(self, client: socket.socket) -> None:
        """Pass a client's signals on; kill the fork of one that is gone."""
        try:
            said = client.recv(1)
        except OSError:
            said = b""
        _send_signal(self._forks[client], said[0] if said else signal.SIGKILL)
        if not said:
            self._forget(client)

    def _reap(self) -> None:
        """Tell clients how their forks have ended."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                code = os.waitstatus_to_exitcode(ended[1])
                for client in [one for one, pid in self._forks.items() if pid == ended[0]]:
                    with contextlib.suppress(OSError):
                        client.sendall(bytes([max(0, -code), max(0, code)]))
                    self._forget(client)

    def _record(self, client: socket.socket) -> Path:
        """The file that names a client's fork."""
        pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return self._folder / str(pid)

    def _forget(self, client: socket.socket) -> None:
        self._record(client).unlink(missing_ok=True)
        client.close()
        del self._forks[client]


def _exactly(client: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not (got := client.recv(size - len(data))):
            raise OSError("the client is gone")
        data += got
    return bytes(data)


def _send_signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def main() -> None:
    for name in LIBRARIES:
        import_module(name)
    gc.collect()
    gc.freeze()  # what is there stays, in memory that the forks share
    become = Server(sys.argv[1]).serve()
    if become is not None:
        process, streams = become
        process.run(streams)


if __name__ == "__main__":
    main()
