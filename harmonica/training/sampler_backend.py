"""Run the trajectories of a training with a sampler, step by step.

Its model has a branch file.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.router import Router
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.models.vae import draws_pixels
from harmonica.samplers import Sampler
from harmonica.training.backend import Sketch, TrajectoryBackend
from harmonica.training.config import TrainingConfig
from harmonica.training.iepo import image_changes
from harmonica.training.memory_savings import NO_SAVINGS, MemorySavings
from harmonica.training.plans.forecast_sketch import sketch_image_error
from harmonica.training.plans.step_sketch import sketch_steps
from harmonica.training.sdt import SdtTrainer, StepRecord


class SamplerBackend(TrajectoryBackend):
    """Runs that differ only from some step on share what lies before it."""

    has_segments = True

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.is_flow_matching = sampler.model.is_flow_matching

    @property
    def device(self) -> torch.device:
        device: torch.device = next(iter(self.sampler.model.parameters())).device
        return device

    @property
    def has_pictures(self) -> bool:
        return draws_pixels(self.sampler.model)

    def images(self, batch: Batch, plan: Plan | None = None, reuse: Reuse = "hold") -> Tensor:
        inputs = (self.sampler, batch.noise_NCHW, batch.condition_N)
        return sample(*inputs, plan, reuse=reuse, keys=batch.keys)

    def step_sketch(
        self,
        batch: Batch,
        *,
        reach: int,
        corrections: int,
        probes: int,
        segments: bool = False,
        savings: MemorySavings = NO_SAVINGS,
    ) -> Tensor:
        return sketch_steps(
            self.sampler,
            batch,
            reach=reach,
            corrections=corrections,
            probes=probes,
            segments=segments,
            savings=savings,
        )

    def image_changes(self, router: Router, batch: Batch, config: TrainingConfig) -> Tensor:
        assert config.iepo != "none"
        return image_changes(self.sampler, router, batch, kind=config.iepo, config=config.sdt)

    def train_trajectory(
        self,
        sdt: SdtTrainer,
        batches: Sequence[Batch],
        lambda_T: Tensor,
        *,
        beta: float,
        average: Callable[[Tensor], None],
        on_gradient: Callable[[int, Tensor], object],
    ) -> list[StepRecord]:
        records, _ = sdt.train_trajectory(
            batches, lambda_T, beta=beta, average=average, on_gradient=on_gradient
        )
        return records

    def sketch(
        self,
        plan: Plan,
        batch: Batch,
        full_NX: Tensor,
        *,
        order: int,
        probes: int,
        savings: MemorySavings = NO_SAVINGS,
    ) -> Sketch:
        return sketch_image_error(
            self.sampler, plan, batch, full_NX, order=order, probes=probes, savings=savings
        )
