"""Sampling of a batch, with every branch computed or under a plan."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harmonica.core.accumulation import AccumulatedSums, AccumulationPlan, is_worth_accumulating
from harmonica.core.cache import BranchCache, Reuse
from harmonica.core.passes import planned_pass
from harmonica.core.plan import Plan
from harmonica.models.step_conditionings import StepConditionings
from harmonica.samplers import Sampler, State
from harmonica.samplers.noise import SampleKeys

OnStep = Callable[[int, Callable[[], Tensor]], None]
"""Called after step i with what makes the predicted x_0 (N, C, H, W): progress bars, previews."""


def planned_step(
    sampler: Sampler, i: int, state: State, compute_row: Sequence[bool], cache: BranchCache
) -> tuple[State, Tensor]:
    """Run step i under a row of a plan; returns the next state and the guided output."""
    hidden, conditioning = sampler.embed(i, state)
    guided = sampler.guide(planned_pass(sampler.model, hidden, conditioning, compute_row, cache, i))
    return sampler.advance(i, state, guided), guided


def accumulated_step(sampler: Sampler, i: int, state: State, sums: AccumulatedSums) -> tuple[State, Tensor]:
    """Run step i like `planned_step`, with sums in place of cached values."""
    hidden, conditioning = sampler.embed(i, state)
    guided = sampler.guide(sums.planned_pass(sampler.model, hidden, conditioning, i))
    return sampler.advance(i, state, guided), guided


@torch.inference_mode()
def sample(
    sampler: Sampler,
    noise_NCHW: Tensor,
    condition_N: Any,
    plan: Plan | None = None,
    *,
    reuse: Reuse = "hold",
    keys: SampleKeys | None = None,
    on_step: OnStep | None = None,
    accumulate: bool | None = None,
) -> Tensor:
    """Sample images or latents (N, C, H, W); computes all branches without a plan.

    Args:
        keys: the samples' keys, for samplers that draw noise.
        accumulate: add up the values to be reused ahead of time (`harmonica.core.accumulation`) instead of
            caching them. None does so if it halves the memory. Images differ by rounding.

    Raises:
        ValueError: the plan was made for another number of steps or branches, or a stochastic sampler
            was not given its keys.
    """
    if plan is not None:
        check_plan(plan, sampler)
    model = sampler.model
    state = sampler.start(noise_NCHW, condition_N, keys)
    cache = BranchCache(len(model.branches), reuse, plan.forecast if plan else None)
    sums: AccumulatedSums | None = None
    if plan is not None and isinstance(state.conditions_T, StepConditionings):
        if accumulate is None:
            accumulate = is_worth_accumulating(model, plan, reuse)
        if accumulate:
            ahead = AccumulationPlan.of(plan, reuse, model)
            ahead_T = state.conditions_T.looking_ahead(ahead.lookahead)
            state, sums = replace(state, conditions_T=ahead_T), AccumulatedSums(ahead, ahead_T)
    for i in reversed(range(sampler.num_steps)):
        row = plan.compute[i] if plan is not None else (True,) * len(model.branches)
        before = state
        if sums is None:
            state, guided = planned_step(sampler, i, before, row, cache)
        else:
            state, guided = accumulated_step(sampler, i, before, sums)
        if on_step is not None:
            on_step(i, partial(sampler.predict_clean, i, before, guided))
    return sampler.finish(state)


def check_plan(plan: Plan, sampler: Sampler) -> None:
    """Refuse a plan whose shape is not (sampler steps, model branches)."""
    if plan.num_steps != sampler.num_steps:
        raise ValueError(
            f"the plan has {plan.num_steps} steps and num_inference_steps is {sampler.num_steps}: "
            "use the router's own step count, or train a router for this one"
        )
    if plan.num_branches != len(sampler.model.branches):
        raise ValueError(
            f"the plan has {plan.num_branches} branches and the model {len(sampler.model.branches)}: "
            "use the model the router was trained for"
        )
