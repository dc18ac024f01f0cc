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


class _Mix(torch.autograd.Function):
    """r * computed + (1 - r) * cached in half precision: weights and their gradient in float32.

    In half precision 1 - r would be 16% off where r is near 1, and a sum over all elements is the
    router's gradient.
    """

    @staticmethod
    def forward(ctx: Any, cached: Tensor, computed: Tensor, score: Tensor) -> Tensor:
        ctx.save_for_backward(cached, computed, score)
        return torch.lerp(cached.float(), computed.float(), score).to(computed.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        (grad,) = grads
        cached, computed, score = ctx.saved_tensors
        return None, (grad * score).to(grad.dtype), (grad.float() * (computed.float() - cached.float())).sum()


def _mix(cached: Tensor, computed: Tensor, score: Tensor) -> Tensor:
    if computed.dtype == score.dtype:
        return torch.lerp(cached, computed, score)
    return _Mix.apply(cached, computed, score)


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
        y = _mix(cache.read(index, step), computed, scores_B[index])
        if is_refreshed:
            cache.write(index, step, y)
        hidden_NLD = branch.merge(hidden_NLD, y, conditioning)
    return model.head(hidden_NLD, conditioning)
