"""The soft and the planned pass over a model's branches.

`BranchedTransformer.forward` is the full pass. `planned_pass` with everything computed is bit-identical to
it, `soft_pass` at r = 1 equals it.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from harmonica.core.cache import BranchCache
from harmonica.core.correction import corrected
from harmonica.core.recompute import branches_per_checkpoint, checkpointed, recompute_later
from harmonica.execution.levels import runner_of
from harmonica.models.base import Branch, BranchedTransformer


def planned_pass(
    model: BranchedTransformer,
    hidden_NLD: Tensor,
    conditioning: Any,
    compute_row: Sequence[bool],
    cache: BranchCache,
    step: int,
    *,
    units: Sequence[Branch] | None = None,
    recompute: bool = False,
) -> Tensor:
    """Run one step of inference: compute and cache the planned branches.

    A reused branch costs one fused multiply-add; its norm, modulation and sub-layer are not run.

    Args:
        units: what the row has entries for, if not the model's branches (`harmonica.core.segments`).
        recompute: backward computes the branches again, some at a time, instead of keeping what they need.

    Returns:
        The model's output (N, out_channels, H, W), corrected where the plan says so.
    """
    units = units or model.branches
    compute = recompute_later if recompute else _compute
    for indices, is_computed in runs_of(compute_row):
        if is_computed:
            hidden_NLD = compute(model, units, indices, hidden_NLD, conditioning, cache, step)
        else:
            hidden_NLD = runner_of(model).reuse(units, indices, hidden_NLD, conditioning, cache, step)
    return corrected(model.head(hidden_NLD, conditioning), step, cache.outputs, model.in_channels)


def _compute(
    model: BranchedTransformer,
    units: Sequence[Branch],
    indices: range,
    hidden_NLD: Tensor,
    conditioning: Any,
    cache: BranchCache,
    step: int,
) -> Tensor:
    """Compute, merge and cache neighbouring units.

    Returns the hidden state after them (N, L, D).
    """
    for index in indices:
        hidden_NLD, y_NLD = runner_of(model).compute(units[index], index, hidden_NLD, conditioning)
        cache.write(index, step, y_NLD)
    return hidden_NLD


def runs_of(compute_row: Sequence[bool]) -> Iterator[tuple[range, bool]]:
    """Yield the runs of neighbouring branches, in order.

    The branches of a run are all computed or all reused.
    """
    first = 0
    for last in range(1, len(compute_row) + 1):
        if last == len(compute_row) or compute_row[last] != compute_row[first]:
            yield range(first, last), compute_row[first]
            first = last


def _soft_branches(
    model: BranchedTransformer,
    indices: range,
    conditioning: Any,
    refresh_row: Sequence[bool],
    cache: BranchCache,
    step: int,
    hidden_NLD: Tensor,
    scores_B: Tensor,
) -> tuple[Tensor, ...]:
    """Return the hidden state after these branches, and values for the cache.

    Changes nothing, so that a checkpoint can run it again: `cache` is one that nobody writes to.
    """
    kept, runner = [], runner_of(model)
    for index in indices:
        branch, score = model.branches[index], scores_B[index]
        hidden_NLD, y = runner.mix(branch, index, hidden_NLD, conditioning, cache, step, score)
        if refresh_row[index]:
            kept.append(y.detach())
    return hidden_NLD, *kept


def soft_pass(
    model: BranchedTransformer,
    hidden_NLD: Tensor,
    conditioning: Any,
    scores_B: Tensor,
    refresh_row: Sequence[bool],
    cache: BranchCache,
    step: int,
    *,
    recompute: bool = False,
) -> Tensor:
    """Run one training step: y is `r * computed + (1 - r) * cached` in every branch.

    Args:
        scores_B: r of each branch (B,), the scores of this step's router row.
        refresh_row: where r > tau: the cache takes the mixed output there and keeps its own elsewhere.
        recompute: backward computes the branches again, some at a time, instead of keeping what they need.

    Returns:
        The model's output (N, out_channels, H, W).
    """
    count = len(model.branches)
    size = branches_per_checkpoint(count) if recompute else 1
    for first in range(0, count, size):
        indices = range(first, min(first + size, count))
        # The recomputation reads what was read here, whatever has been written since.
        compute = partial(_soft_branches, model, indices, conditioning, refresh_row, cache.copy(), step)
        if recompute and indices[-1] + 1 < count:  # backward begins at the last ones: nothing to gain
            hidden_NLD, *kept = checkpointed(compute, hidden_NLD, scores_B)
        else:
            hidden_NLD, *kept = compute(hidden_NLD, scores_B)
        refreshed = (index for index in indices if refresh_row[index])
        for index, value in zip(refreshed, kept, strict=True):
            cache.write(index, step, value)
    return model.head(hidden_NLD, conditioning)
