"""Images in the engine's queue: jobs, their reports while they are sampled, and their results.

Shapes: C channels, H W image.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .image_request import ImageRequest


@dataclass(frozen=True, slots=True)
class Job:
    """A queued image, and the callback that reports its steps."""

    image: ImageRequest
    arrived: float = field(default_factory=time.perf_counter)
    preview_steps: tuple[int, ...] = ()
    """Steps after which the callback gets a predicted image."""
    report: Callable[[int, Tensor | None], None] | None = None
    """Called after every step, in the trajectory's thread."""


@dataclass(frozen=True, slots=True)
class SampledImage:
    """An image that its trajectory has finished, and how that went."""

    image_CHW: Tensor
    batch_size: int
    waited_s: float
    seconds: float


def report_step(jobs: Sequence[Job], step: int, predict: Callable[[Sequence[int]], Tensor]) -> None:
    """Call the jobs' callbacks; only images that are previewed at this step are predicted and decoded."""
    indices = [index for index, job in enumerate(jobs) if step in job.preview_steps]
    previews = dict(zip(indices, predict(indices))) if indices else {}
    for index, job in enumerate(jobs):
        if job.report is not None:
            job.report(step, previews.get(index))


def preview_steps(num_steps: int, count: int) -> tuple[int, ...]:
    """Return the steps after which previews are sent: evenly spaced, and fewer if there are too few steps."""
    steps = {round(num_steps * (i + 1) / (count + 1)) for i in range(count)}
    return tuple(sorted(steps - {0, num_steps}))
