"""Sampling of a batch, with every branch computed or under a plan."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from harmonica.core.cache import Reuse
from harmonica.core.graphed_sampling import OnStep, sample_graphed
from harmonica.core.plan import Plan
from harmonica.core.trajectory import Trajectory
from harmonica.samplers import Sampler
from harmonica.samplers.noise import SampleKeys


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
    if sampler.model.execution == "graphed":
        drawn = sample_graphed(
            sampler,
            noise_NCHW,
            condition_N,
            plan,
            reuse=reuse,
            keys=keys,
            on_step=on_step,
            accumulate=accumulate,
        )
        if drawn is not None:
            return drawn
    trajectory = Trajectory(sampler, plan, reuse, accumulate)
    trajectory.start(noise_NCHW, condition_N, keys)
    for i in reversed(range(sampler.num_steps)):
        before, guided = trajectory.step(i)
        if on_step is not None:
            on_step(i, partial(sampler.predict_clean, i, before, guided))
    return trajectory.finish()


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
