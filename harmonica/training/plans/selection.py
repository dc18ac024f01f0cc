"""Select the plan whose images are nearest to the full sampler's.

The samples are in no training.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.training.backend import TrajectoryBackend

SMALLEST_ERROR = 1e-12
"""Mean squared error of an image, below which none is told from another."""
_RANGE = 2.0


def mean_log_of(error_N: Tensor) -> Tensor:
    """Return the mean logarithm (base 10) of images' errors.

    Args:
        error_N: the mean squared error of each image; it counts in double precision.
    """
    return error_N.double().clamp_min(SMALLEST_ERROR).log10().mean()


def psnr_of(mean_log: float) -> float:
    """Return the PSNR in dB for a mean logarithm (base 10) of errors.

    Values are in [-1, 1].
    """
    return 10 * (math.log10(_RANGE**2) - mean_log)


class PlanSelector:
    """A comparison of plans by the mean logarithm of image errors.

    The logarithm keeps a few images with large errors from deciding.
    """

    def __init__(self, plans: Mapping[str, Plan], reuse: Reuse) -> None:
        self.plans, self.reuse = dict(plans), reuse
        self.total_P = torch.zeros(len(plans), dtype=torch.float64)
        self.trajectories = 0

    @torch.no_grad()
    def observe(
        self,
        backend: TrajectoryBackend,
        batches: Sequence[Any],
        average: Callable[[Tensor], None],
        *,
        full: Sequence[Tensor] | None = None,
        as_pictures: bool = False,
    ) -> dict[str, float]:
        """Measure some samples and return the metrics to log, errors in decibels below 1.

        Args:
            full: the full images of each part (N, ...), where they are known.
            as_pictures: compare the backend's pictures, where its images are latents.
        """
        drawn = backend.pictures if as_pictures else backend.images
        count = sum(map(len, batches))
        sums_P = torch.zeros(len(self.plans) + 1, dtype=torch.float64, device=backend.device)
        for number, batch in enumerate(batches):
            full_NX = full[number] if full else drawn(batch)
            errors: dict[Plan, Tensor] = {}  # training often leaves the plan that it began with
            for place, plan in enumerate(self.plans.values()):
                if plan not in errors:
                    images_NX = drawn(batch, plan, self.reuse)
                    errors[plan] = (images_NX - full_NX).double().square().flatten(1).mean(1)
                sums_P[place] += mean_log_of(errors[plan]) * len(batch) / count
            sums_P[-1] += errors[plan].sum() / count  # of the last one, the plan as trained
        average(sums_P)
        *logs, loss = sums_P.tolist()
        self.total_P += sums_P[:-1].cpu()
        self.trajectories += 1
        return {"loss": loss} | {f"choice.{name}_db": -10 * log for name, log in zip(self.plans, logs)}

    @property
    def best(self) -> str:
        """Return the name of the plan whose images are nearest; of equals, the first."""
        return self.ranked[0]

    @property
    def ranked(self) -> list[str]:
        """Return the names of the plans, the one with the nearest images first."""
        names = list(self.plans)
        return [names[place] for place in self.total_P.argsort(stable=True).tolist()]

    def psnr(self, name: str) -> float:
        """Return the mean PSNR of a plan's images to the full ones in dB.

        Values are in [-1, 1].
        """
        return psnr_of(self.mean_log(name))

    def mean_log(self, name: str) -> float:
        """Return the mean logarithm (base 10) of the errors of a plan's images."""
        return float(self.total_P[list(self.plans).index(name)]) / self.trajectories

    def state(self) -> dict[str, Tensor]:
        """Return the sums over the observed trajectories for a checkpoint."""
        return {"total": self.total_P, "trajectories": torch.tensor(self.trajectories)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load what `state` returned."""
        self.total_P, self.trajectories = state["total"].cpu(), int(state["trajectories"])
