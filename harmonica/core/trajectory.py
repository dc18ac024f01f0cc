"""Run one trajectory of a batch, step by step.

Every branch is computed, or those that a plan says.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from harmonica.core.accumulation import AccumulatedSums, AccumulationPlan, is_worth_accumulating
from harmonica.core.cache import BranchCache, Reuse
from harmonica.core.passes import planned_pass
from harmonica.core.plan import Plan
from harmonica.core.segments import units_of
from harmonica.execution.levels import runner_of
from harmonica.models.base import Branch
from harmonica.models.step_conditionings import StepConditionings
from harmonica.samplers import Sampler, State
from harmonica.samplers.noise import SampleKeys


def full_step(sampler: Sampler, i: int, state: State) -> tuple[State, Tensor]:
    """Compute every branch at step i; return the next state and the guided output."""
    hidden, conditioning = sampler.embed(i, state)
    model = sampler.model
    guided = sampler.guide(runner_of(model).full_pass(model, hidden, conditioning))
    return sampler.advance(i, state, guided), guided


def planned_step(
    sampler: Sampler,
    i: int,
    state: State,
    compute_row: Sequence[bool],
    cache: BranchCache,
    *,
    units: Sequence[Branch] | None = None,
    recompute: bool = False,
) -> tuple[State, Tensor]:
    """Run step i under a row of a plan; returns the next state and the guided output.

    Args:
        units: what the row has entries for, if not the model's branches (`harmonica.core.segments`).
        recompute: backward computes the branches again (`harmonica.core.recompute`).
    """
    hidden, conditioning = sampler.embed(i, state)
    output = planned_pass(
        sampler.model, hidden, conditioning, compute_row, cache, i, units=units, recompute=recompute
    )
    guided = sampler.guide(output)
    return sampler.advance(i, state, guided), guided


def planned_end(
    sampler: Sampler,
    plan: Plan,
    state: State,
    cache: BranchCache,
    first: int,
    *,
    units: Sequence[Branch] | None = None,
    recompute: bool = False,
) -> Tensor:
    """Run steps `first` ... 0 under a plan.

    Returns the final images or latents (N, C, H, W).

    Args:
        units: what the plan has columns for, if not the model's branches (`harmonica.core.segments`).
        recompute: backward computes the branches again (`harmonica.core.recompute`).
    """
    for i in range(first, -1, -1):
        row = plan.compute[i]
        state, _ = planned_step(sampler, i, state, row, cache, units=units, recompute=recompute)
    return sampler.finish(state)


def accumulated_step(sampler: Sampler, i: int, state: State, sums: AccumulatedSums) -> tuple[State, Tensor]:
    """Run step i like `planned_step`, with sums in place of cached values."""
    hidden, conditioning = sampler.embed(i, state)
    guided = sampler.guide(sums.planned_pass(sampler.model, hidden, conditioning, i))
    return sampler.advance(i, state, guided), guided


class Trajectory:
    """A batch on its way from noise to images."""

    state: State

    def __init__(self, sampler: Sampler, plan: Plan | None, reuse: Reuse, accumulate: bool | None) -> None:
        """Start nothing yet.

        Args:
            plan: None computes all branches.
            accumulate: as for `harmonica.core.sampling.sample`.
        """
        self.sampler, self._plan = sampler, plan
        self._units: Sequence[Branch] = sampler.model.branches
        self._cache = BranchCache(0)
        self._ahead: AccumulationPlan | None = None
        self._sums: AccumulatedSums | None = None
        if plan is None:
            return
        self._units, self._plan = units_of(sampler.model, plan)
        self._cache = BranchCache.under(self._plan, reuse)
        if is_worth_accumulating(sampler.model, plan, reuse) if accumulate is None else accumulate:
            self._ahead = AccumulationPlan.of(plan, reuse, sampler.model)

    def start(
        self,
        noise_NCHW: Tensor,
        condition_N: Any,
        keys: SampleKeys | None = None,
        step_noise: Sequence[Tensor] = (),
    ) -> None:
        """Begin before step T-1.

        Args:
            step_noise: the noise of each step (N, C, H, W), where it is drawn ahead.
        """
        state = self.sampler.start(noise_NCHW, condition_N, keys, step_noise)
        if self._ahead is not None and isinstance(state.conditions_T, StepConditionings):
            ahead_T = state.conditions_T.looking_ahead(self._ahead.lookahead)
            state = replace(state, conditions_T=ahead_T)
            self._sums = AccumulatedSums(self._ahead, ahead_T, self._units)
        self.state = state

    def step(self, i: int) -> tuple[State, Tensor]:
        """Take step i; returns the state before it and the guided output."""
        before, sampler = self.state, self.sampler
        if self._sums is not None:
            self.state, guided = accumulated_step(sampler, i, before, self._sums)
        elif self._plan is not None:
            row = self._plan.compute[i]
            self.state, guided = planned_step(sampler, i, before, row, self._cache, units=self._units)
        else:
            self.state, guided = full_step(sampler, i, before)
        return before, guided

    def release(self) -> None:
        """Let go of what only further steps would need."""
        self._cache, self._sums = BranchCache(0), None

    def finish(self) -> Tensor:
        """Return the images or latents (N, C, H, W)."""
        return self.sampler.finish(self.state)
