"""Where each worker is and what its time goes into, gathered at checkpoints, so that a slow node is seen.

The one that the others wait for has the least of `reduce`, and the most of something else.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import torch
import torch.distributed as dist
from ray.util.metrics import Gauge

from pipelines.runtime import node_names

NAMES = ("data", "teacher", "student", "backward", "reduce", "lambda", "start", "choice", "forecast")
_PREFIX = "seconds."


def worker_nodes(device: torch.device | str) -> list[str]:
    """The node of every rank; all ranks call it."""
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


class WorkerTimes:
    """Of one worker, since the last checkpoint."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._seconds = dict.fromkeys(NAMES, 0.0)
        self._trajectories = 0
        self._gauge = Gauge(
            "harmonica_train_seconds",
            description="Seconds of a trajectory that a training worker spent on something.",
            tag_keys=("rank", "kind"),
        )

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds["data"] += time.perf_counter() - started

    def add(self, metrics: dict[str, float]) -> None:
        """Take the times of a trajectory out of its metrics."""
        self._trajectories += 1
        for name in [name for name in metrics if name.startswith(_PREFIX)]:
            self._seconds[name.removeprefix(_PREFIX)] += metrics.pop(name)

    def gather(self, rank: int) -> dict[str, float]:
        """Mean seconds a trajectory by worker and kind, such as `worker.1.student_s`; all ranks call it."""
        mean = [self._seconds[name] / max(1, self._trajectories) for name in NAMES]
        for name, seconds in zip(NAMES, mean):
            self._gauge.set(seconds, {"rank": str(rank), "kind": name})
        self._seconds, self._trajectories = dict.fromkeys(NAMES, 0.0), 0
        mine = torch.tensor(mean, device=self._device)  # NCCL moves nothing that is not on the GPU
        return {
            f"worker.{worker}.{name}_s": seconds
            for worker, row in enumerate(_gather(mine))
            for name, seconds in zip(NAMES, row.tolist())
        }
