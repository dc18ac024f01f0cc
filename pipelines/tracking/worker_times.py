"""Gather each worker's node, and its times by activity, at checkpoints.

They show a slow node: the worker that the others wait for has the shortest time of `reduce`, and a longer
time than the others of another activity.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.util.metrics import Gauge

from ..runtime.ray_runtime import node_names

_DATA = "data"
_PREFIX = "seconds."


def worker_nodes(device: torch.device | str) -> list[str]:
    """Return the node of every rank; all ranks call it."""
    node_id = bytes.fromhex(ray.get_runtime_context().get_node_id())
    mine = torch.tensor(list(node_id), dtype=torch.uint8, device=device)
    names = node_names()
    return [names[bytes(row.tolist()).hex()] for row in _gather(mine)]


def _gather(mine: torch.Tensor) -> list[torch.Tensor]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    each = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(each, mine)
    return each


def _gather_times(mine: dict[str, float]) -> list[dict[str, float]]:
    """Return the times of every rank, whose names may differ."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    each: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(each, mine)
    return each


class WorkerTimes:
    """The times of one worker are summed by activity since the last checkpoint."""

    def __init__(self) -> None:
        self._seconds = {_DATA: 0.0}
        self._trajectories = 0
        self._gauge = Gauge(
            "harmonica_train_seconds",
            description="Seconds of a trajectory that a training worker spent on something.",
            tag_keys=("rank", "kind"),
        )

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Add the time of the body to that of waiting for data."""
        started = time.perf_counter()
        yield
        self._count(_DATA, time.perf_counter() - started)

    def add(self, metrics: dict[str, float]) -> None:
        """Take the times of a trajectory out of its metrics."""
        self._trajectories += 1
        for name in [name for name in metrics if name.startswith(_PREFIX)]:
            self._count(name.removeprefix(_PREFIX), metrics.pop(name))

    def _count(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def gather(self, rank: int) -> dict[str, float]:
        """Return the mean seconds of a trajectory by worker and activity.

        Names are such as `worker.1.student_s`. All ranks call it.
        """
        mean = {name: total / max(1, self._trajectories) for name, total in self._seconds.items()}
        for name, seconds in mean.items():
            self._gauge.set(seconds, {"rank": str(rank), "kind": name})
        # The names stay: an activity that has ended takes no time, and its curve in MLflow ends at 0.
        self._seconds, self._trajectories = dict.fromkeys(self._seconds, 0.0), 0
        return {
            f"worker.{worker}.{name}_s": seconds
            for worker, times in enumerate(_gather_times(mean))
            for name, seconds in times.items()
        }
