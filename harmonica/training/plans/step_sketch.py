"""Linearise the final latents in the reuse of every step.

This takes one full trajectory.

Reusing step i means to merge, in place of what its branches compute, a combination of what they computed at
earlier steps. With y_i the values that the step adds and coefficients c_d that sum to 1, the hidden state
before the head changes by `sum over d of c_d * (y_{i+d} - y_i)`, and the final latents, to first order, by
the same combination of their derivatives. A correction of the model's output changes it in the same way. One
full trajectory and a backward pass for each random probe
measure those of all steps and distances at once; any plan of whole steps, with any forecast, is then a sum of
some of them (`harmonica.training.plans.search`).

Shapes: N images, M model rows, T steps, D distances of branches and J of outputs, R = N * probes.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from harmonica.core.cache import BranchCache
from harmonica.core.correction import corrected
from harmonica.core.passes import planned_pass
from harmonica.core.segments import segment_starts, segments_of
from harmonica.data.batch import Batch
from harmonica.execution.offloading import ActivationOffloading
from harmonica.execution.values import KeptValues
from harmonica.samplers import Sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.memory_savings import NO_SAVINGS, MemorySavings
from harmonica.training.plans.fitted_weights import OUTPUT, Unknown
from harmonica.training.plans.forecast_sketch import precision_of, sketch_of


class _Changing(torch.autograd.Function):
    """A value that a handle would move towards others.

    The gradient of the handle's row m and column d is `<g_m, other_d - value>`. Only the values are kept for
    it, which the cache keeps anyway.
    """

    @staticmethod
    def forward(ctx: Any, handle_MD: Tensor, value: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(value, *others)
        ctx.shape = handle_MD.shape
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        value, *others = ctx.saved_tensors
        wide = gradients[0].to(precision_of(value))  # a row's sum is of many small products
        moved_MD = torch.zeros(ctx.shape, dtype=wide.dtype, device=value.device)
        for place, other in enumerate(others):
            change = other.to(value.device, non_blocking=True) - value
            moved_MD[:, place] = (wide * change.to(wide)).flatten(1).sum(1)
        return moved_MD, *(None for _ in (value, *others))


class ChangesCache(BranchCache):
    """A cache of full steps whose values are differentiable in their change by reuse.

    It is read at the step that was written last, and gives back what was written. The gradients of its
    handles say what moving towards the values of earlier steps would do.
    """

    def __init__(self, num_branches: int, reach: int, offloading: ActivationOffloading | None = None) -> None:
        """Begin empty.

        Args:
            reach: the largest distance of a step that another one is reused from.
            offloading: keeps the values of earlier steps, which only the backward pass reads.
        """
        super().__init__(num_branches, "forecast")
        self.reach, self._depth, self._offloading = reach, 1 + reach, offloading
        self.handles: dict[int, Tensor] = {}
        """Of each step, zeros (M, D), which all branches share. Column d - 1 is of distance d."""

    def _keep(self, branch: int, step: int, value: Tensor) -> None:
        if (to := self._offloading) is not None:
            self._kept[branch] = tuple((i, to.on_host(earlier)) for i, earlier in self._kept[branch])
        super()._keep(branch, step, value)

    def read(self, branch: int, step: int) -> Tensor:
        (_, value), *earlier = self._kept[branch]
        if step not in self.handles:
            self.handles[step] = torch.zeros(
                len(value), self.reach, dtype=precision_of(value), device=value.device, requires_grad=True
            )
        changing: Tensor = _Changing.apply(  # type: ignore[no-untyped-call]
            self.handles[step], value, *(other for _, other in earlier)
        )
        return changing

    def kept(self, branch: int, step: int) -> KeptValues:
        return KeptValues.of([self.read(branch, step)], ())


def sketch_steps(
    sampler: Sampler,
    batch: Batch,
    *,
    reach: int,
    corrections: int,
    probes: int,
    segments: bool = False,
    savings: MemorySavings = NO_SAVINGS,
) -> Tensor:
    """Project the change of the latents by each step on random probes.

    It is changed by reuse, and by correction of its output.

    Args:
        batch: with keys, which determine the probes.
        reach: the largest distance of a step that another one is reused from, D.
        corrections: the largest distance of an output that corrects another one, J.
        segments: of what branches add together (`harmonica.core.segments`), and not of each branch's value.

    Returns:
        The derivatives (R, T, D + J) in the coefficient c_d of each step, of its branches and then of its
        output; 0 where there is no step i + d.
    """
    assert batch.keys is not None, "training's samples have keys"
    model = sampler.model
    units = segments_of(model, segment_starts(model)) if segments else model.branches
    everything, nothing = (True,) * len(units), (False,) * len(units)
    offloading = savings.offloading(model.parameters())
    cache, state = ChangesCache(len(units), reach, offloading), batch.start(sampler)
    outputs = ChangesCache(1, reach, offloading) if corrections else None
    with torch.enable_grad(), offloading or nullcontext():
        for i in reversed(range(sampler.num_steps)):
            hidden, conditioning = sampler.embed(i, state)
            output = planned_pass(
                model, hidden, conditioning, everything, cache, i, units=units, recompute=savings.recompute
            )
            if i < sampler.num_steps - 1:
                # The step once more, all of it reused from itself: its branches do not respond to each other.
                same = planned_pass(model, hidden.detach(), conditioning, nothing, cache, i, units=units)
                output = with_gradient(output, same)
            # Its gradient is that of the correction alone.
            output = with_gradient(output, corrected(output.detach(), i, outputs, model.in_channels))
            state = sampler.advance(i, state, sampler.guide(output))
        images_NCHW = sampler.finish(state)
    handles = handles_of([cache], [outputs] if outputs else [])
    return projected_steps(images_NCHW, handles, batch.keys, sampler.num_steps, (reach, corrections), probes)


StepHandles = tuple[Mapping[int, Sequence[Tensor]], Mapping[int, Sequence[Tensor]]]
"""Of each step, zeros (M, D), as often as it was run: of its branches and of its output."""


def handles_of(branches: Iterable[ChangesCache], outputs: Iterable[ChangesCache]) -> StepHandles:
    """Return the handles of all caches of a trajectory, step by step."""
    found: tuple[dict[int, list[Tensor]], dict[int, list[Tensor]]] = ({}, {})
    for handles, caches in zip(found, (branches, outputs), strict=True):
        for cache in caches:
            for i, handle_MD in cache.handles.items():
                handles.setdefault(i, []).append(handle_MD)
    return found


def with_gradient(output: Any, same: Any) -> Any:
    """Return a tensor with the gradient of an equal one besides its own.

    Anything else is returned as it is.
    """
    return output + (same - same.detach()) if isinstance(output, Tensor) else output


def projected_steps(
    images_NX: Tensor,
    handles: StepHandles,
    keys: SampleKeys,
    num_steps: int,
    distances: tuple[int, int],
    probes: int,
) -> Tensor:
    """Differentiate projections of the latents in the handles of all steps.

    Args:
        images_NX: the latents (N, ...), with the graph of the handles.
        handles: M being rows of images.
        distances: D and J, how many are kept of the branches and of the output.

    Returns:
        The derivatives (R, T, D + J).
    """
    names: dict[Unknown, Sequence[Tensor]] = {}
    for branch, of_steps in zip((0, OUTPUT), handles, strict=True):
        names |= {(i, branch, 0): each for i, each in sorted(of_steps.items())}
    # Nothing has changed from full to full, so that all probes are random.
    seen = sketch_of(images_NX.detach(), images_NX, names, list(names), keys, num_steps, probes)
    reach, corrections = distances
    moved_RTD = images_NX.new_zeros(len(images_NX) * probes, num_steps, reach + corrections)
    for place, (i, branch, _) in enumerate(names):
        if branch == OUTPUT:
            moved_RTD[:, i, reach:] = seen.jacobian_RP[:, place, :corrections].to(moved_RTD)
        else:
            moved_RTD[:, i, :reach] = seen.jacobian_RP[:, place].to(moved_RTD)
    return moved_RTD
