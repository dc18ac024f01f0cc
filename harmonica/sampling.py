"""Sampling a batch: all T steps, full or under a plan. No host sync, no data-dependent branch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from harmonica.cache import BranchCache, Reuse
from harmonica.passes import planned_pass
from harmonica.plan import Plan
from harmonica.samplers import Ddim

OnStep = Callable[[int, Tensor], None]
"""Called after step i with x_{t-1}: progress bars, previews."""


def planned_step(
    sampler: Ddim,
    i: int,
    x_MCHW: Tensor,
    condition_M: Tensor,
    compute_row: Sequence[bool],
    cache: BranchCache,
) -> tuple[Tensor, Tensor]:
    """Step i under one row of a plan: x_{t-1} (M, C, H, W), and the guided output that led there."""
    hidden, conditioning = sampler.embed(i, x_MCHW, condition_M)
    guided = sampler.guide(planned_pass(sampler.model, hidden, conditioning, compute_row, cache, i))
    return sampler.advance(i, x_MCHW, guided), guided


@torch.inference_mode()
def sample(
    sampler: Ddim,
    noise_NCHW: Tensor,
    condition_N: Tensor,
    plan: Plan | None = None,
    *,
    reuse: Reuse = "hold",
    on_step: OnStep | None = None,
) -> Tensor:
    """Images or latents (N, C, H, W) from noise; every branch computed where `plan` is None.

    Raises:
        ValueError: the plan was made for another number of steps or branches.
    """
    if plan is not None:
        check_plan(plan, sampler)
    model = sampler.model
    cache = BranchCache(len(model.branches), reuse)
    x, condition = sampler.start(noise_NCHW, condition_N)
    for i in reversed(range(sampler.num_steps)):
        row = plan.compute[i] if plan is not None else (True,) * len(model.branches)
        x, _ = planned_step(sampler, i, x, condition, row, cache)
        if on_step is not None:
            on_step(i, x)
    return sampler.finish(x)


def check_plan(plan: Plan, sampler: Ddim) -> None:
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
