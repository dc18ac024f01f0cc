"""Define the jobs of the engine's queue, their results and their measurements.

Shapes: C channels, H W image.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from .image_request import ImageRequest
from .served_plan import ServedPlan


@dataclass(frozen=True, slots=True)
class Job:
    """A job is a queued image, with the callback that reports its steps."""

    image: ImageRequest
    arrived: float = field(default_factory=time.perf_counter)
    preview_steps: tuple[int, ...] = ()
    """Steps after which the callback gets a predicted image."""
    report: Callable[[int, Tensor | None], None] | None = None
    """Called after every step, in the trajectory's thread."""


@dataclass(frozen=True, slots=True)
class SampledImage:
    """A sampled image comes with the size and times of its trajectory."""

    image_CHW: Tensor
    batch_size: int
    waited_s: float
    seconds: float


class Metrics(Protocol):
    """The receiver of the engine's measurements is called from any thread."""

    def trajectory(self, served: ServedPlan, waits_s: Sequence[float], seconds: float) -> None:
        """Record a trajectory that has ended, and how long each of its images had waited."""

    def waiting(self, count: int) -> None:
        """Set the number of images in the queue."""

    def rejected(self, reason: str) -> None:
        """Count an image that is not generated."""

    def serving(self, version: str, rejected: str) -> None:
        """Set the champion's version, and that of a rejected one ("" if there is none)."""


def report_step(jobs: Sequence[Job], step: int, predict: Callable[[Sequence[int]], Tensor]) -> None:
    """Call the callbacks of all jobs after a step.

    Only images that are previewed at this step are predicted and decoded.

    Args:
        predict: returns the predicted images (N, C, H, W) at the given indices.
    """
    indices = [index for index, job in enumerate(jobs) if step in job.preview_steps]
    previews = dict(zip(indices, predict(indices))) if indices else {}
    for index, job in enumerate(jobs):
        if job.report is not None:
            job.report(step, previews.get(index))


def preview_steps(num_steps: int, count: int) -> tuple[int, ...]:
    """Return the steps after which previews are sent.

    They are evenly spaced, and fewer than `count` if there are too few steps.
    """
    steps = {round(num_steps * (i + 1) / (count + 1)) for i in range(count)}
    return tuple(sorted(steps - {0, num_steps}))
