"""Report what each training worker does, and give up a run that stands still."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from harmonica.cli.common import say

from ..run_state.interruption import interrupt_main_thread, sigterm_raises
from .board import Board, Reached

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_LOOK_EVERY_S, _SAY_EVERY_S, _END_S = 1.0, 20.0, 1.0


def make_board() -> Any:
    """Return the actor's handle.

    The actor lives on the driver's node and ends with the driver.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()


def run_watched(work: Callable[[], Result], board: Any, stall_s: float, wanted: str) -> Result:
    """Return the result of `work()`, given up if workers stand still.

    That is when no worker has begun anything new for `stall_s`. A thread watches, and the work is done here:
    a thread that was left waiting for Ray would crash this process when Ray is shut down at its end.

    Args:
        work: called in the main thread.
        wanted: what workers need before the first can begin, for the message.

    Raises:
        TimeoutError: says what every worker waits for.
        Terminated: SIGTERM was received.
    """
    watch = _Watch(board, stall_s, wanted)
    try:
        with sigterm_raises(), watch:  # which the watch may send
            return work()
    except KeyboardInterrupt:
        if watch.error is not None:
            raise watch.error from None
        raise


class _Watch:
    """Show the progress from a thread; interrupt the main one if there is none."""

    def __init__(self, board: Any, stall_s: float, wanted: str) -> None:
        self.error: Exception | None = None
        """Why the main thread was interrupted."""
        self._board, self._stall_s, self._wanted = board, stall_s, wanted
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(_END_S)

    def _run(self) -> None:
        started, lines = time.monotonic(), _Lines()
        try:
            while not self._ended.wait(_LOOK_EVERY_S):
                self._look(started, lines)
        except Exception as error:
            self.error = error
            if not self._ended.is_set():
                interrupt_main_thread()

    def _look(self, started: float, lines: "_Lines") -> None:
        said, reached, announced = ray.get(self._board.read.remote())
        lines.announce(announced)
        lines.show(reached)
        still = min([age for _, age in said.values()], default=time.monotonic() - started)
        if still > self._stall_s:
            raise TimeoutError(_stall_message(said, still, self._wanted))


class _Lines:
    """Print how far training is: not often, and nothing twice."""

    def __init__(self) -> None:
        self._last: Reached | None = None
        self._announced = ""
        self._at = time.monotonic()

    def announce(self, line: str) -> None:
        if line != self._announced:
            self._announced = line
            say(f"[train] {line}")

    def show(self, reached: Reached | None) -> None:
        now = time.monotonic()
        if reached is None or reached == self._last or now - self._at < _SAY_EVERY_S:
            return
        self._last, self._at = reached, now
        phase, left, loss, cur = reached
        say(f"[train] {phase}, loss {loss:.3g}, CUR {cur:.1%}, {left}")


def _stall_message(said: dict[int, tuple[str, float]], still: float, wanted: str) -> str:
    if not said:
        free, all_ = ray.available_resources(), ray.cluster_resources()
        shown = ", ".join(f"{free.get(k, 0):g} of {all_[k]:g} {k}" for k in ("CPU", "GPU") if k in all_)
        return (
            f"no training worker has started for {still:.0f} s: it waits for {wanted}, and the cluster has "
            f"{shown} free: add nodes, or ask for less"
        )
    each = "; ".join(f"rank {rank}: {doing} ({age:.0f} s)" for rank, (doing, age) in said.items())
    return f"training has made no progress for {still:.0f} s (train.stall_timeout_s): {each}"
