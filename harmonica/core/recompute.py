"""Branches that the backward pass computes again, some at a time.

The passes of `harmonica.core.passes` keep little of them for it.
Shapes: N rows, L tokens, D width, B branches.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from harmonica.core.cache import BranchCache
from harmonica.execution.levels import runner_of
from harmonica.models.base import Branch, BranchedTransformer

GROUPS_OF_SEGMENT = 3
"""The number of groups of a model's branches that a checkpointed pass recomputes one after another."""


def recompute_later(
    model: BranchedTransformer,
    units: Sequence[Branch],
    indices: range,
    hidden_NLD: Tensor,
    conditioning: Any,
    cache: BranchCache,
    step: int,
) -> Tensor:
    """Compute, merge and cache neighbouring units, and keep little for backward.

    That computes the branches again, some at a time. Returns the hidden state after them (N, L, D).
    """
    if units[indices.start].parts:
        for index in indices:
            segment, before_NLD = units[index], hidden_NLD
            for parts in parts_per_checkpoint(segment.parts, len(model.branches)):
                hidden_NLD = checkpointed(partial(_run_all, model, parts, conditioning), hidden_NLD)
            cache.write(index, step, hidden_NLD - before_NLD)
            if segment.has_post_branch:
                hidden_NLD = checkpointed(partial(_run_all, model, segment.always, conditioning), hidden_NLD)
        return hidden_NLD
    size = branches_per_checkpoint(len(units))
    for first in indices[::size]:
        group = range(first, min(first + size, indices.stop))
        compute = partial(_computed_branches, model, group, conditioning)
        hidden_NLD, *values = checkpointed(compute, hidden_NLD)
        for index, y_NLD in zip(group, values, strict=True):
            cache.write(index, step, y_NLD)
    return hidden_NLD


def checkpointed(compute: Callable[..., Any], *inputs: Tensor) -> Any:
    """Return what `compute` returns; backward calls it again."""
    return checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False)


def _run_all(
    model: BranchedTransformer, branches: Sequence[Branch], conditioning: Any, hidden_NLD: Tensor
) -> Tensor:
    return runner_of(model).run_all(branches, hidden_NLD, conditioning)


def _computed_branches(
    model: BranchedTransformer, indices: range, conditioning: Any, hidden_NLD: Tensor
) -> tuple[Tensor, ...]:
    """Return the hidden state after these branches, and the value of each."""
    runner, values = runner_of(model), []
    for index in indices:
        hidden_NLD, y = runner.compute(model.branches[index], index, hidden_NLD, conditioning)
        values.append(y)
    return hidden_NLD, *values


def branches_per_checkpoint(num_branches: int) -> int:
    """Return how many branches a checkpointed pass recomputes at a time.

    The number about minimises memory. Between groups the pass keeps the hidden state, 4 bytes a value, and
    within the group being recomputed about 14 bytes a value and branch: B / k * 4 + 14 * k is least near
    k = sqrt(B) / 2.
    """
    nearest: int = round(num_branches**0.5 / 2)
    return max(1, nearest)


def parts_per_checkpoint(parts: Sequence[Branch], num_branches: int) -> Iterator[Sequence[Branch]]:
    """Yield the branches of a segment that a checkpointed pass recomputes together.

    They are a third of a model's. The hidden states between them are kept at all T steps, and what is
    within a group for one: with the numbers of `branches_per_checkpoint`, T * B / k * 4 + 14 * k is least at
    3 groups for DiT-XL/2 and T = 20, and at 2 for T = 50.
    """
    size = -(-num_branches // GROUPS_OF_SEGMENT)
    for first in range(0, len(parts), size):
        yield parts[first : first + size]
