"""What each training worker does at the moment, so that a run that stands still says what it waits for."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_LOOK_EVERY_S = 1.0


class _Board:
    """An actor beside the driver; workers tell it, without waiting, what they begin."""

    def __init__(self) -> None:
        self._said: dict[int, tuple[str, float]] = {}

    def tell(self, rank: int, doing: str) -> None:
        self._said[rank] = (doing, time.monotonic())

    def read(self) -> dict[int, tuple[str, float]]:
        """Of each rank what it does, and for how many seconds."""
        now = time.monotonic()
        return {rank: (doing, now - since) for rank, (doing, since) in sorted(self._said.items())}


def make_board() -> Any:
    """The actor's handle; it lives on the driver's node and ends with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_Board).options(num_cpus=0, scheduling_strategy=here).remote()


def run_watched(work: Callable[[], Result], board: Any, stall_s: float, wanted: str) -> Result:
    """`work()` in a thread, given up when for `stall_s` no worker has begun anything new.

    The thread also keeps Ray Train from taking over Ctrl-C, after which this process would end with exit
    code 0; an abandoned thread's actors end with this process.

    Args:
        wanted: what workers need before the first can begin, for the message.

    Raises:
        TimeoutError: says what every worker waits for.
    """
    done: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:  # raised again by the thread that waits
            done.put((None, error))

    threading.Thread(target=run, daemon=True, name="training").start()
    started = time.monotonic()
    while True:
        try:
            result, error = done.get(timeout=_LOOK_EVERY_S)
        except queue.Empty:
            said = ray.get(board.read.remote())
            still = min([age for _, age in said.values()], default=time.monotonic() - started)
            if still > stall_s:
                raise TimeoutError(_words(said, still, wanted)) from None
            continue
        if error is not None:
            raise error
        return result  # type: ignore[return-value]


def _words(said: dict[int, tuple[str, float]], still: float, wanted: str) -> str:
    if not said:
        free, all_ = ray.available_resources(), ray.cluster_resources()
        shown = ", ".join(f"{free.get(k, 0):g} of {all_[k]:g} {k}" for k in ("CPU", "GPU") if k in all_)
        return (
            f"no training worker has started for {still:.0f} s: it waits for {wanted}, and the cluster has "
            f"{shown} free: add nodes, or ask for less"
        )
    each = "; ".join(f"rank {rank}: {doing} ({age:.0f} s)" for rank, (doing, age) in said.items())
    return f"training has made no progress for {still:.0f} s (train.stall_timeout_s): {each}"
