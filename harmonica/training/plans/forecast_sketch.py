"""Linearise the image error of a plan in its fitted weights.

These are the weights of its forecasts and of its output's correction.

The change of the final latents is close to linear in the weights. It is seen through probes u: one backward
pass along a planned trajectory gives `u . dx_0/dw` of all weights at once
(`harmonica.training.plans.forecast_fit` fits them). The first probe of an image is the direction of its
change, so that the gradient of its error is exact; the others are random.

Shapes: N images, M model rows, C H W image, P weights, R = N * probes rows of the least squares.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from harmonica.core.cache import BranchCache
from harmonica.core.plan import Correction, Forecast, Plan
from harmonica.core.segments import units_of
from harmonica.core.trajectory import planned_end
from harmonica.data.batch import Batch
from harmonica.execution.values import KeptValues, extrapolate
from harmonica.samplers import Sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.backend import Sketch
from harmonica.training.memory_savings import NO_SAVINGS, MemorySavings
from harmonica.training.plans.fitted_weights import OUTPUT, Unknown, unknowns


def precision_of(value: Tensor) -> torch.dtype:
    """Return the value's precision, float32 at least."""
    return torch.promote_types(value.dtype, torch.float32)


class _Weighted(torch.autograd.Function):
    """A forecast with handles that would move its weights.

    The gradient of row m of the k-th handle is `<g_m, value_k - value_(k+1)>`. Only the values are kept for
    it, which the cache keeps anyway.
    """

    @staticmethod
    def forward(ctx: Any, count: int, forecast: Tensor, *handles_and_values: Tensor) -> Tensor:
        ctx.save_for_backward(*handles_and_values[count:])
        return forecast.view_as(forecast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), values = gradients, ctx.saved_tensors
        wide = gradient.to(precision_of(gradient))  # a row's sum is of many small products
        moved = [(wide * (newer - older).to(wide)).flatten(1).sum(1) for newer, older in pairwise(values)]
        return None, gradient, *moved, *(None for _ in values)


class ProbedCache(BranchCache):
    """A cache that is differentiable in every weight of every image."""

    def __init__(
        self, num_branches: int, learned: Forecast | None, correction: Correction | None = None
    ) -> None:
        self.handles: dict[Unknown, Tensor] = {}
        """Of each weight that was used, zeros (M,) of the rows."""
        super().__init__(num_branches, "forecast", learned, correction)

    def _of_outputs(self, learned: Forecast) -> "BranchCache":
        outputs = _ProbedOutputs(1, learned)
        outputs.handles = self.handles
        return outputs

    def write(self, branch: int, step: int, value: Tensor) -> None:
        self._keep(branch, step, value)

    def read(self, branch: int, step: int) -> Tensor:
        values = [value for _, value in self._kept[branch]]
        forecast = extrapolate(values, self.weights(branch, step) if len(values) > 1 else ())
        count = len(values) - 1
        handles = [
            torch.zeros(
                len(forecast), dtype=precision_of(forecast), device=forecast.device, requires_grad=True
            )
            for _ in range(count)
        ]
        self.handles |= {self._name(step, branch, k): handle_M for k, handle_M in enumerate(handles)}
        weighted: Tensor = _Weighted.apply(count, forecast, *handles, *values)  # type: ignore[no-untyped-call]
        return weighted

    def _name(self, step: int, branch: int, k: int) -> Unknown:
        return step, branch, k

    def kept(self, branch: int, step: int) -> KeptValues:
        return KeptValues.of([self.read(branch, step)], ())


class _ProbedOutputs(ProbedCache):
    """The outputs of a probed cache, which share its handles."""

    def _name(self, step: int, branch: int, k: int) -> Unknown:
        return step, OUTPUT, k


def sketch_image_error(
    sampler: Sampler,
    plan: Plan,
    batch: Batch,
    full_NCHW: Tensor,
    *,
    order: int,
    probes: int,
    savings: MemorySavings = NO_SAVINGS,
) -> Sketch:
    """Linearise the change from full to planned latents in the weights of a plan.

    Args:
        plan: with weights of forecasts and of a correction, around which the change is linearised.
        batch: with keys, which also determine the random probes, so that these do not depend on the worker.
        full_NCHW: the full sampler's latents.
    """
    assert batch.keys is not None, "training's samples have keys"
    units, plan = units_of(sampler.model, plan)
    cache = ProbedCache(plan.num_branches, plan.forecast, plan.correction)
    offloading = savings.offloading(sampler.model.parameters())
    with torch.enable_grad(), offloading or nullcontext():
        state, first = batch.start(sampler), plan.num_steps - 1
        images_NCHW = planned_end(
            sampler, plan, state, cache, first, units=units, recompute=savings.recompute
        )
    handles = {name: [handle_M] for name, handle_M in cache.handles.items()}
    names = unknowns(plan, order, plan.corrections)
    del cache  # the backward pass has what it needs of it
    return sketch_of(full_NCHW, images_NCHW, handles, names, batch.keys, plan.num_steps, probes)


def probes_of(change_NX: Tensor, keys: SampleKeys, num_steps: int, probes: int) -> Iterator[Tensor]:
    """Yield the probes u (N, ...) of each image.

    The expected mean of their u u^T is the identity over the number of elements, as of random ones. The first
    is the direction of each image's change, so that the gradient of its error has no variance. The others are
    drawn at random and made perpendicular to it. A single probe is random, and so are all those of an image
    that has not changed.
    """
    size, ones = change_NX[0].numel(), [1] * (change_NX.dim() - 1)
    norm_N = change_NX.flatten(1).norm(dim=1).view(-1, *ones)
    along_NX = change_NX / norm_N.clamp_min(torch.finfo(change_NX.dtype).tiny)
    has_changed_N = norm_N > 0 if probes > 1 else torch.zeros_like(norm_N, dtype=torch.bool)
    for probe in range(probes):
        # Steps from T on are nobody's noise.
        drawn = torch.from_numpy(keys.step_noise(num_steps + probe, tuple(change_NX.shape[1:])))
        random_NX = drawn.to(change_NX)
        if probe == 0:
            u_NX = along_NX * probes**0.5
        else:
            share_N = (random_NX * along_NX).flatten(1).sum(1).view(-1, *ones)
            u_NX = (random_NX - share_N * along_NX) * (probes / (probes - 1)) ** 0.5
        yield torch.where(has_changed_N, u_NX, random_NX) / size**0.5


def sketch_of(
    full_NX: Tensor,
    images_NX: Tensor,
    handles: Mapping[Unknown, Sequence[Tensor]],
    names: Sequence[Unknown],
    keys: SampleKeys,
    num_steps: int,
    probes: int,
) -> Sketch:
    """Project the change of the latents on probes, and differentiate it.

    Args:
        full_NX: the full sampler's latents (N, ...).
        images_NX: those under the plan, with the graph of the handles.
        handles: of each weight, zeros (M,) that were added, M being rows of images, as often as it takes; or
            (M, D) for D weights of each name, where all names have handles.
        names: the weights to differentiate in; one without handles had nothing to weigh.
        keys: of the images; they determine the random probes.
    """
    precision = precision_of(images_NX)
    change_NX, count = images_NX.detach().to(precision) - full_NX.to(precision), len(full_NX)
    flat = [handle_M for name in names for handle_M in handles.get(name, ())]
    residuals, jacobians = [], []
    for probe, u_NX in enumerate(probes_of(change_NX, keys, num_steps, probes)):
        residuals.append((change_NX * u_NX).flatten(1).sum(1))
        moved: list[Tensor] = []
        if flat:  # else nothing is reused that has two values before it
            projected, is_last = (images_NX * u_NX.to(images_NX)).sum(), probe == probes - 1
            moved = list(
                torch.autograd.grad(projected, flat, retain_graph=not is_last, materialize_grads=True)
            )
        columns = []
        for name in names:
            # Guidance has two rows an image, or two calls, with one weight.
            rows = [moved.pop(0).unflatten(0, (-1, count)).sum(0) for _ in handles.get(name, ())]
            columns.append(torch.stack(rows).sum(0) if rows else change_NX.new_zeros(count))
        jacobians.append(torch.stack(columns, 1) if columns else change_NX.new_zeros(count, 0))
    return Sketch(change_NX.square().flatten(1).mean(1), torch.cat(residuals), torch.cat(jacobians))
