"""A program and all that it starts, to be ended by process id and nothing else with it."""

import contextlib
import os
import pwd
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

_STOP_S = 10.0


def free_port(other_than: Collection[int] = ()) -> int:
    """A port that nothing listens on now, and none of those that something is about to."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port not in other_than:
            return port


def as_user(user: pwd.struct_passwd | None) -> dict[str, Any]:
    """Popen's arguments; None is the user of this process."""
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}


class Session:
    """A command in a session of its own: its descendants stay in it, whatever groups they make."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        user: pwd.struct_passwd | None = None,
    ) -> None:
        """
        Args:
            log: gets all output; the command runs in its folder.
            user: whom it runs as; only root may choose.
        """
        self.log = log
        with log.open("a") as out:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
                cwd=log.parent,
                **as_user(user),
            )

    def wait_until(self, holds: Callable[[], bool], timeout_s: float, what: str) -> None:
        """
        Raises:
            RuntimeError: the command ended first, or it took too long; with the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        while not holds():
            self.check_alive(what)
            if time.monotonic() > deadline:
                said = self.log.read_text()[-2000:]
                raise RuntimeError(f"{what} took {timeout_s:.0f} s, its log {self.log} says\n{said}")
            time.sleep(0.2)

    def check_alive(self, what: str) -> None:
        """
        Raises:
            RuntimeError: the command has ended; with the end of its log.
        """
        if self.process.poll() is not None:
            raise RuntimeError(f"{what} has ended, its log {self.log} with\n{self.log.read_text()[-2000:]}")

    def pids(self, name: str = "") -> list[int]:
        """Processes that are alive, those with `name` in what runs."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                # After the command's name, which may hold anything: state, parent, group, session.
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                program = (folder / "cmdline").read_bytes().split(b"\0")[0]
                if int(session) == self.process.pid and state != "Z" and name.encode() in program:
                    found.append(int(folder.name))
        return found

    def kill(self) -> None:
        """kill -9 of all at once, as a power cut."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End all: asked first, then not."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_S
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.2)
            self.process.poll()
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
