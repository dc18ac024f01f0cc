"""Leases in a run's storage let one process write; they expire unless renewed.

A holder on this machine keeps its lease while its process lives. A holder elsewhere keeps it while it renews
it, which is found out by waiting, so that no two machines' clocks have to agree.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from harmonica.cli.common import say

from .interruption import interrupt_main_thread
from .lease_cells import Cell, cell_of
from .storage import RunStorage

logger = logging.getLogger(__name__)

EXPIRES_S, RENEWED_EVERY_S = 60.0, 10.0
_LOOK_S = 0.5
_DYING_S = 3.0  # a process that was killed takes a while to end
_SAME_START_S = 5.0  # psutil works it out from two clocks


def _machine() -> str:
    """Return an id of this machine: host name, boot id and process namespace.

    Processes that see each other share it.
    """
    parts = [socket.gethostname()]
    for path, read in (
        ("/proc/sys/kernel/random/boot_id", lambda p: Path(p).read_text().strip()),
        ("/proc/self/ns/pid", os.readlink),
    ):
        try:
            parts.append(read(path))
        except OSError:  # not Linux
            parts.append("")
    return " ".join(parts)


def _lives(holder: dict[str, Any]) -> bool:
    """Return whether the holder's process runs on this machine.

    A later process that has the same id does not count.
    """
    try:
        process = psutil.Process(holder["pid"])
        started: float = process.create_time()
        is_same = bool(abs(started - holder["started"]) < _SAME_START_S)
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _holder_in(content: bytes) -> dict[str, Any] | None:
    """Return the holder in a lease's content; None if there is none or it is damaged."""
    try:
        found = json.loads(content)
        return found if isinstance(found, dict) and "nonce" in found else None
    except ValueError:
        return None


class Lease:
    """A lease on a run, held by this process: a context manager that renews it.

    It is given back at the end.
    """

    def __init__(self, cell: Cell, run_id: str, *, renewed_every_s: float = RENEWED_EVERY_S) -> None:
        self._cell, self._run_id, self._every_s = cell, run_id, renewed_every_s
        self._about = {
            "run_id": run_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            "machine": _machine(),
            "started": psutil.Process().create_time(),
            "nonce": secrets.token_hex(16),
        }
        self._content, self._renewed = b"", 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")
        self.lost = ""
        """The reason why the lease is lost, "" while it is held."""

    def take(self, before: bytes) -> bool:
        """Take the lease in place of the known content.

        Return False if another process was first.
        """
        self._renewed += 1
        content = json.dumps(self._about | {"renewed": self._renewed}).encode()
        if not self._cell.swap(before, content):
            return False
        self._content = content
        return True

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(_LOOK_S)
        try:
            self._cell.delete(self._content)
        except Exception as failed:  # of boto3 and disks; it ends by itself
            logger.info("the lease of %s is left to expire (%s)", self._run_id, type(failed).__name__)

    def _keep(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self._renew()
                if self._ended.is_set():  # it was given back meanwhile
                    self._cell.delete(self._content)
            except Exception as failed:  # of boto3 and disks: where this one cannot write, nobody else can
                logger.info("the lease of %s waits for its storage (%s)", self._run_id, type(failed).__name__)
            if self.lost:
                interrupt_main_thread()
                return

    def _renew(self) -> None:
        if self.take(self._content):
            return
        there = self._cell.read()[0]
        holder = _holder_in(there)
        # Without an answer the store may have taken it all the same; and somebody may have deleted it.
        if holder is None or holder["nonce"] == self._about["nonce"]:
            self._content = there
            if self._ended.is_set() or self.take(there):
                return
            holder = _holder_in(self._cell.read()[0])
        whose = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        self.lost = (
            f"run_id {self._run_id} is written by {whose} now, since this one gave no sign for "
            f"{EXPIRES_S:.0f} s: it stops here"
        )


def claim(
    storage: RunStorage, *, expires_s: float = EXPIRES_S, renewed_every_s: float = RENEWED_EVERY_S
) -> Lease:
    """Return the lease of a run, which no other process holds at that time.

    A holder on this machine is alive if its process is, one elsewhere if it renews its lease.

    Raises:
        ValueError: another process holds it; the message says which, since when, and what to do.
    """
    try:
        return _claim(storage, expires_s, renewed_every_s)
    except ValueError:
        raise
    except Exception as error:  # of boto3 and disks
        raise ValueError(
            f"storage_path {storage.shown_root} does not take the lease of run_id {storage.run_id} "
            f"({type(error).__name__}: {error}): give a folder or bucket that can be written and read"
        ) from error


def _claim(storage: RunStorage, expires_s: float, renewed_every_s: float) -> Lease:
    cell, run_id = cell_of(storage), storage.run_id
    lease, machine = Lease(cell, run_id, renewed_every_s=renewed_every_s), _machine()
    seen, told, deadline = b"", False, time.monotonic() + _DYING_S
    while True:
        content, age_s = cell.read()
        holder = _holder_in(content)
        is_here = holder is not None and holder["machine"] == machine
        is_free = holder is None or (not _lives(holder) if is_here else age_s > expires_s)
        if is_free:
            if lease.take(content):
                return lease
            continue  # another one was first: it is the holder now
        assert holder is not None
        lives = time.monotonic() > deadline if is_here else bool(seen) and content != seen
        if lives:  # or it has renewed the lease while this one waited
            raise ValueError(_refusal(holder, run_id, expires_s))
        if not told and not is_here:
            said = f"{_words(holder)}: waiting until it gives a sign or its lease ends, at most"
            say(f"run {run_id} may be written by {said} {max(expires_s - age_s, 0) + 1:.0f} s")
        seen, told = content, True
        time.sleep(_LOOK_S)


def _words(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"


def _refusal(holder: dict[str, Any], run_id: str, expires_s: float) -> str:
    return (
        f"run_id {run_id} is being written by {_words(holder)}: wait for its end, stop it (its lease ends "
        f"with it, or {expires_s:.0f} s after its last sign), or take another run id"
    )
