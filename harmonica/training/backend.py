"""Define the interface of what runs the trajectories of a training.

That is a sampler, step by step, or a pipeline, call by call.

Shapes: N images, T steps, B branches, X elements of an image's latents, R = N * probes, P weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.router import Router
from harmonica.training.config import TrainingConfig
from harmonica.training.memory_savings import NO_SAVINGS, MemorySavings
from harmonica.training.sdt import SdtTrainer, StepRecord


@dataclass(frozen=True, slots=True)
class Sketch:
    """Random projections of the image error of a batch under a plan."""

    error_N: Tensor
    """Mean squared change of each image's latents (N,)."""
    residual_R: Tensor
    """The change projected on each probe (R,)."""
    jacobian_RP: Tensor
    """The derivative of the residuals in the weights (R, P)."""


class TrajectoryBackend(ABC):
    """Runs the trajectories that a router is trained on.

    A batch is a backend's own: it has a length, the number of its images, and `split(size)`, which returns
    parts of at most so many (`harmonica.data.batch.Batch`).
    """

    sampler: Any
    """Has `num_steps`, and a `model` with `branches` and `macs()`."""
    fixed_steps: frozenset[int] = frozenset()
    """Steps below T-1 that compute everything under any plan, as far as they are known."""
    is_flow_matching: bool = False
    """Whether the sampler is one of flow matching."""
    from_start: ClassVar[bool] = False
    """Whether every run begins at the first step; else runs share what lies before they differ."""
    has_segments: ClassVar[bool] = False
    """Whether neighbouring branches can be reused as one (`harmonica.core.segments`)."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Return the device of the latents."""

    @abstractmethod
    def images(self, batch: Any, plan: Plan | None = None, reuse: Reuse = "hold") -> Tensor:
        """Return the final latents (N, ...), with every branch computed or under a plan."""

    @property
    @abstractmethod
    def has_pictures(self) -> bool:
        """Return whether `pictures` gives pictures, whose PSNR can be a target."""

    def pictures(self, batch: Any, plan: Plan | None = None, reuse: Reuse = "hold") -> Tensor:
        """Return the final pictures (N, ...) in [-1, 1], full or under a plan.

        They are what is sampled, where that is pixels.
        """
        return self.images(batch, plan, reuse)

    @abstractmethod
    def step_sketch(
        self,
        batch: Any,
        *,
        reach: int,
        corrections: int,
        probes: int,
        segments: bool = False,
        savings: MemorySavings = NO_SAVINGS,
    ) -> Tensor:
        """Linearise the final latents in the reuse and the correction of each step.

        This takes one full trajectory.

        Args:
            reach: the largest distance D of a step that another one is reused from.
            corrections: the largest distance J of an output that corrects another one.
            segments: of what branches add together, and not of each branch's value; where `has_segments`.

        Returns:
            Random projections of the change that step i makes if what it adds is replaced by what step i + d
            has added, and if its output is replaced by that of step i + d, (R, T, D + J); 0 where there is no
            step i + d.
        """

    @abstractmethod
    def image_changes(self, router: Router, batch: Any, config: TrainingConfig) -> Tensor:
        """Return the changes that `config.iepo` wants and the steps' errors (2, T-1)."""

    @abstractmethod
    def train_trajectory(
        self,
        sdt: SdtTrainer,
        batches: Sequence[Any],
        lambda_T: Tensor,
        *,
        beta: float,
        average: Callable[[Tensor], None],
        on_gradient: Callable[[int, Tensor], object],
    ) -> list[StepRecord]:
        """Update every trained row once, and return the updates' records."""

    @abstractmethod
    def sketch(
        self,
        plan: Plan,
        batch: Any,
        full_NX: Tensor,
        *,
        order: int,
        probes: int,
        savings: MemorySavings = NO_SAVINGS,
    ) -> Sketch:
        """Linearise the change from full to planned latents in the forecast weights.

        Args:
            plan: with forecast weights, around which the change is linearised.
            full_NX: the batch's final latents with every branch computed, as `images` returns them.
        """
