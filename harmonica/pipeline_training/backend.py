"""Trajectories of a training by whole calls of a pipeline.

A pipeline's loop cannot be entered in the middle, so runs share nothing of what lies before the step that
they differ at: a refresh of lambda takes T calls a batch.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.router import Router
from harmonica.integrations.recorded.even_steps import is_flow_matching
from harmonica.integrations.recorded.view import RecordedTransformer
from harmonica.pipeline_training.image_error import Errors, image_changes
from harmonica.pipeline_training.pipeline_calls import PipelineCalls
from harmonica.pipeline_training.plan_policy import PlanPolicy, ProbedPolicy, StepSketchPolicy
from harmonica.pipeline_training.policies import Generation, Policy, SdtPolicy, precise
from harmonica.pipeline_training.sampling import Prompt
from harmonica.samplers.noise import SampleKeys
from harmonica.training.backend import Sketch, TrajectoryBackend
from harmonica.training.config import TrainingConfig
from harmonica.training.memory_savings import NO_SAVINGS, MemorySavings
from harmonica.training.plans.fitted_weights import unknowns
from harmonica.training.plans.forecast_sketch import sketch_of
from harmonica.training.plans.step_sketch import projected_steps
from harmonica.training.sdt import SdtTrainer, StepRecord


@dataclass(frozen=True)
class PipelineBatch:
    """N prompts, and the keys of their rows."""

    prompts: Sequence[Prompt]
    keys: SampleKeys

    def __len__(self) -> int:
        return len(self.prompts)

    def split(self, size: int) -> list["PipelineBatch"]:
        """Return the rows in order, at most `size` at a time; 0 leaves them together."""
        size = size or len(self)
        parts = (slice(first, first + size) for first in range(0, len(self), size))
        return [PipelineBatch(self.prompts[part], self.keys[part]) for part in parts]


@dataclass(frozen=True)
class _Steps:
    """The sampler as training sees it: its steps, and what branches cost."""

    num_steps: int
    model: RecordedTransformer


class PipelineBackend(TrajectoryBackend):
    """Runs trajectories by calls of a pipeline that is open."""

    from_start = True

    def __init__(self, calls: PipelineCalls) -> None:
        self.calls = calls
        self.sampler = _Steps(calls.num_steps, calls.view)
        self.is_flow_matching = is_flow_matching(getattr(calls.pipe, "scheduler", None))

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.calls.transformers[0].parameters()).device
        return device

    @property
    def has_pictures(self) -> bool:
        return self.calls.has_pictures

    def images(self, batch: PipelineBatch, plan: Plan | None = None, reuse: Reuse = "hold") -> Tensor:
        return self._drawn(batch, plan, reuse, "latent")

    def pictures(self, batch: PipelineBatch, plan: Plan | None = None, reuse: Reuse = "hold") -> Tensor:
        if not self.calls.has_decoder:
            return self.images(batch, plan, reuse)
        return 2 * self._drawn(batch, plan, reuse, "pt") - 1

    def _drawn(self, batch: PipelineBatch, plan: Plan | None, reuse: Reuse, output_type: str) -> Tensor:
        assert plan is None or reuse == self.calls.reuse, "the calls keep what their own reuse needs"
        shape = (self.calls.num_steps, len(self.calls.view.branches))
        policy = PlanPolicy(plan or Plan.full(*shape))
        drawn_NX = self._run(policy, batch, output_type=output_type)
        self._find_fixed(policy.fixed)
        return drawn_NX

    def _run(
        self,
        policy: Policy,
        batch: PipelineBatch,
        *,
        output_type: str = "latent",
        has_gradient: bool = False,
    ) -> Tensor:
        drawn = self.calls.run(
            policy,
            batch.prompts,
            batch.keys.indices,
            output_type=output_type,
            has_gradient=has_gradient,
        )
        return precise(drawn)

    def _weights(self) -> Iterator[Tensor]:
        return chain.from_iterable(transformer.parameters() for transformer in self.calls.transformers)

    def _find_fixed(self, steps: Collection[int]) -> None:
        self.fixed_steps |= frozenset(steps) - {self.calls.num_steps - 1}

    def step_sketch(
        self,
        batch: PipelineBatch,
        *,
        reach: int,
        corrections: int,
        probes: int,
        segments: bool = False,
        savings: MemorySavings = NO_SAVINGS,
    ) -> Tensor:
        assert not segments, "a recorded transformer has one branch for all blocks instead"
        offloading = savings.offloading(self._weights())
        policy = StepSketchPolicy(
            reach, corrects=corrections > 0, recompute=savings.recompute, offloading=offloading
        )
        with offloading or nullcontext():
            images_NX = self._run(policy, batch, has_gradient=True)
        self._find_fixed(policy.fixed)
        handles = policy.handles()
        cure = "train.initial even and train.start_trajectories 0"
        for of_steps in handles:
            self._check_gradient(images_NX, of_steps, batch, cure)
        distances, num_steps = (reach, corrections), self.calls.num_steps
        return projected_steps(images_NX, handles, batch.keys, num_steps, distances, probes)

    def _check_gradient(
        self,
        images_NX: Tensor,
        handles: Mapping[Any, Sequence[Tensor]],
        batch: PipelineBatch,
        cure: str,
    ) -> None:
        """Refuse a pipeline whose latents say nothing of the handles.

        Args:
            cure: what to give where it is so.
        """
        if handles and not images_NX.requires_grad:
            raise ValueError(
                f"{type(self.calls.pipe).__name__} lets no gradient through its loop, which this phase "
                f"of the training needs: give {cure}"
            )
        if any(len(handle_M) % len(batch) for each in handles.values() for handle_M in each):
            raise ValueError(
                "a reused branch of the transformer has other rows than the batch, and forecasts are fitted "
                f"row by row: give {cure}"
            )

    def image_changes(self, router: Router, batch: PipelineBatch, config: TrainingConfig) -> Tensor:
        assert config.iepo != "none"
        is_hard = config.sdt.student == "hard"

        def run(full: Collection[int], errors: Errors | None) -> Tensor:
            policy = Generation(router, config.sdt.threshold, is_hard, full, errors)
            return self._run(policy, batch)

        return image_changes(run, self.calls.num_steps, config.iepo).to(self.device, torch.float32)

    def train_trajectory(
        self,
        sdt: SdtTrainer,
        batches: Sequence[PipelineBatch],
        lambda_T: Tensor,
        *,
        beta: float,
        average: Callable[[Tensor], None],
        on_gradient: Callable[[int, Tensor], object],
    ) -> list[StepRecord]:
        policy = SdtPolicy(sdt)
        for batch in batches:
            self._run(policy, batch)
        self._find_fixed(policy.fixed)
        records = policy.update(lambda_T, beta=beta, average=average, on_gradient=on_gradient)
        if not records:
            raise ValueError("no step of the pipeline reuses anything of another: there is nothing to train")
        return records

    def sketch(
        self,
        plan: Plan,
        batch: PipelineBatch,
        full_NX: Tensor,
        *,
        order: int,
        probes: int,
        savings: MemorySavings = NO_SAVINGS,
    ) -> Sketch:
        policy = ProbedPolicy(plan, recompute=savings.recompute)
        with savings.offloading(self._weights()) or nullcontext():
            planned_NX = self._run(policy, batch, has_gradient=True)
        handles = policy.handles()
        del policy  # the backward pass has what it needs of its caches
        self._check_gradient(planned_NX, handles, batch, "train.forecast.trajectories 0")
        names = unknowns(plan, order, plan.corrections)
        return sketch_of(full_NX, planned_NX, handles, names, batch.keys, plan.num_steps, probes)
