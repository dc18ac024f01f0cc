"""Two passes over a model's branches beside the full one (`BranchedTransformer.forward`).

They agree where they should: `planned_pass` with everything computed is bit-identical to the full
pass, `soft_pass` at r = 1 equals it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harmonica.cache import BranchCache
from harmonica.models.base import BranchedTransformer


def planned_pass(
    model: BranchedTransformer,
    hidden_NLD: Tensor,
    conditioning: Any,
    compute_row: Sequence[bool],
    cache: BranchCache,
    step: int,
) -> Tensor:
    """Inference: branch b is computed and kept where `compute_row[b]`, else its kept value is merged.

    A reused branch costs one fused multiply-add; its norm, modulation and sub-layer are not run.

    Returns:
        The model's output (N, out_channels, H, W).
    """
    for index, (branch, is_computed) in enumerate(zip(model.branches, compute_row, strict=True)):
        if is_computed:
            y = branch.compute(hidden_NLD, conditioning)
            cache.write(index, step, y)
        else:
            y = cache.read(index, step)
        hidden_NLD = branch.merge(hidden_NLD, y, conditioning)
    return model.head(hidden_NLD, conditioning)


def soft_pass(
    model: BranchedTransformer,
    hidden_NLD: Tensor,
    conditioning: Any,
    scores_B: Tensor,
    refresh_row: Sequence[bool],
    cache: BranchCache,
    step: int,
) -> Tensor:
    """Training: every branch gives `r * computed + (1 - r) * cached`, differentiable in r.

    Args:
        scores_B: r of each branch (B,), the scores of this step's router row.
        refresh_row: where r > tau: the cache takes the mixed output there and keeps its own elsewhere.

    Returns:
        The model's output (N, out_channels, H, W).
    """
    for index, (branch, is_refreshed) in enumerate(zip(model.branches, refresh_row, strict=True)):
        computed = branch.compute(hidden_NLD, conditioning)
        y = torch.lerp(cache.read(index, step), computed, scores_B[index])
        if is_refreshed:
            cache.write(index, step, y)
        hidden_NLD = branch.merge(hidden_NLD, y, conditioning)
    return model.head(hidden_NLD, conditioning)
