"""Time what a training runs, on the slowest worker."""

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.plan_builders import even_steps, stepwise_plan
from harmonica.training.backend import TrajectoryBackend
from harmonica.training.config import TrainingConfig
from harmonica.training.plans.forecast_fit import ForecastFit

_ROUNDS = 3


def slowest(seconds: float, device: torch.device | str) -> float:
    """Return the longest of all workers' seconds, which is the same on each of them."""
    tensor = torch.tensor(seconds, dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def sampling_seconds(backend: TrajectoryBackend, batch: Any, micro_batch_size: int) -> float:
    """Return the seconds of a full sampling of a batch, on this worker.

    One micro-batch is timed, after a first one that compiles and allocates. The backend is left as it was.
    """
    part, fixed = batch.split(micro_batch_size)[0], backend.fixed_steps
    backend.images(part)
    seconds = _seconds(backend, part)
    backend.fixed_steps = fixed  # a training that is given these numbers would not know them yet either
    return seconds * len(batch) / len(part)


def reused_share(backend: TrajectoryBackend, batch: Any, config: TrainingConfig) -> float:
    """Return the time of a step that reuses all, over that of a computed one.

    It is measured on this worker, at the batch size and the level of execution of the training, with the
    differences that its forecasts will have. The backend is left as it was.
    """
    part, fixed, num_steps = batch.split(config.micro_batch_size)[0], backend.fixed_steps, _steps(backend)
    reused = even_steps(num_steps, num_steps // 2)
    plan = stepwise_plan(num_steps, len(backend.sampler.model.branches), reused)
    if config.forecast.trajectories:
        plan = ForecastFit(plan, config.forecast).planned()
    reuse, full_s, planned_s = config.sdt.reuse, list[float](), list[float]()
    for turn in range(1 + _ROUNDS):
        full, planned = _seconds(backend, part), _seconds(backend, part, plan, reuse)
        if turn:  # the first compiles and allocates
            full_s.append(full)
            planned_s.append(planned)
    count = len(set(reused) - backend.fixed_steps)
    backend.fixed_steps = fixed
    ratio = statistics.median(planned_s) / statistics.median(full_s)
    return 1 - (1 - ratio) * num_steps / max(1, count)


def _steps(backend: TrajectoryBackend) -> int:
    count: int = backend.sampler.num_steps
    return count


def _seconds(backend: TrajectoryBackend, part: Any, plan: Plan | None = None, reuse: Reuse = "hold") -> float:
    _wait(backend.device)
    started = time.monotonic()
    backend.images(part, plan, reuse)
    _wait(backend.device)
    return time.monotonic() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
