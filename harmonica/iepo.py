"""Image error proxy (HarmoniCa's IEPO): lambda_i, how much caching at step i hurts the final image.

Three kinds. `leave_one_out` is the paper's, `cumulative` the released code's. `sensitivity` is ours: the
leave-one-out change of the image divided by the step's own error, so that lambda_i * MSE_i is the image
error that step causes. The other two already contain the step's error, so a step at which little is
reused looks harmless, is pushed to reuse, and only looks harmful at the next refresh.

Runs that differ only from step i on share everything before it: each resumes from the state stored
before step i, so a refresh costs (T+1)/2T of T full generations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from harmonica.cache import BranchCache, Reuse
from harmonica.noise import RowKeys
from harmonica.passes import soft_pass
from harmonica.router import Router
from harmonica.samplers import Sampler, State
from harmonica.sampling import planned_step

IepoKind = Literal["leave_one_out", "cumulative", "sensitivity"]
KINDS = get_args(IepoKind)
_SMALLEST_ERROR = 1e-12  # of a step at which nothing is reused; keeps lambda finite


@dataclass(frozen=True, slots=True)
class _Point:
    """A point of a generation: all that the rest of it depends on."""

    state: State
    cache: BranchCache
    guided_MCHW: Tensor | None = None
    """The guided output that led here."""


class _SoftGenerations:
    """Generations under the router's soft weights that branch off from a shared main run."""

    def __init__(self, sampler: Sampler, router: Router, threshold: float, reuse: Reuse) -> None:
        self.sampler, self.router, self.reuse = sampler, router, reuse
        self.threshold = threshold
        self.all = (True,) * len(sampler.model.branches)

    def first(self, state: State) -> _Point:
        """The point after step T-1, which computes everything."""
        return self.full_step(
            self.sampler.num_steps - 1, _Point(state, BranchCache(len(self.all), self.reuse))
        )

    def full_step(self, i: int, point: _Point) -> _Point:
        """Step i with the cache switched off (weights 1); the cache takes what was computed."""
        cache = point.cache.copy()
        state, guided = planned_step(self.sampler, i, point.state, self.all, cache)
        return _Point(state, cache, guided)

    def soft_step(self, i: int, point: _Point) -> _Point:
        """Step i under the router's soft weights."""
        sampler, cache = self.sampler, point.cache.copy()
        hidden, conditioning = sampler.embed(i, point.state)
        scores_B = self.router.scores(i)
        refresh_row = (scores_B > self.threshold).tolist()
        guided = sampler.guide(
            soft_pass(sampler.model, hidden, conditioning, scores_B, refresh_row, cache, i)
        )
        return _Point(sampler.advance(i, point.state, guided), cache, guided)

    def finish_full(self, point: _Point, first: int) -> Tensor:
        """Final latents (M, C, H, W) when steps `first` ... 0 are computed in full."""
        for j in range(first, -1, -1):
            point = self.full_step(j, point)
        return point.state.x_MCHW


@torch.no_grad()  # not inference_mode: lambda enters a loss that is differentiated
def image_error_proxy(
    sampler: Sampler,
    router: Router,
    noise_NCHW: Tensor,
    condition_N: Any,
    *,
    kind: IepoKind,
    threshold: float,
    reuse: Reuse = "hold",
    rows: RowKeys | None = None,
    average: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """lambda (T-1,) of the trajectories from `noise`: mean squared change of the final latents.

    `leave_one_out` (the paper's): against x_0 with soft weights at every step, the cache is switched
    off at step i alone. `cumulative` (released code): from no caching at all, soft weights are switched
    on one step at a time, noisiest first; lambda_i is the change against the generation before.
    `sensitivity`: leave-one-out divided by the MSE between the soft and the full output of step i.

    Args:
        rows: the rows' names, for samplers that draw noise: every generation draws the same.
        average: averages a tensor over all workers in place, so that lambda is that of all their rows.
    """
    if kind not in KINDS:
        raise ValueError(f"iepo.kind is {kind!r}: give one of {', '.join(KINDS)}")
    start = sampler.start(noise_NCHW, condition_N, rows)
    runs = _SoftGenerations(sampler, router, threshold, reuse)
    steps = list(reversed(range(sampler.num_steps - 1)))  # T-2 ... 0
    points = {steps[0]: runs.first(start)}  # the point before step i of the main, soft run
    for i in steps:
        points[i - 1] = runs.soft_step(i, points[i])
    # Row 0: change of the final latents; row 1: the step's own error.
    x = start.x_MCHW
    measured_2T = torch.zeros(2, len(steps), dtype=x.dtype, device=x.device)
    if kind == "cumulative":
        previous = runs.finish_full(points[steps[0]], steps[0])
        for i in steps:
            current = runs.finish_full(points.pop(i - 1), i - 1)
            measured_2T[0, i] = _mean_squared(current, previous)
            previous = current
    else:
        for i in steps:
            point = runs.full_step(i, points.pop(i))
            measured_2T[1, i] = _mean_squared(point.guided_MCHW, points[i - 1].guided_MCHW)
            for j in range(i - 1, -1, -1):
                point = runs.soft_step(j, point)
            measured_2T[0, i] = _mean_squared(point.state.x_MCHW, points[-1].state.x_MCHW)
    if average is not None:
        average(measured_2T)  # before the division: a mean of ratios would depend on who has which rows
    change_T, error_T = measured_2T
    return change_T / error_T.clamp_min(_SMALLEST_ERROR) if kind == "sensitivity" else change_T


def _mean_squared(ours: Tensor | None, other: Tensor | None) -> Tensor:
    assert ours is not None and other is not None
    return (ours - other).square().mean()
