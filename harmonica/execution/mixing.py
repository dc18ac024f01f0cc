"""The mix of a branch's computed and cached value in training."""

from typing import Any

import torch
from torch import Tensor


class _Mix(torch.autograd.Function):
    """r * computed + (1 - r) * cached in half precision, with r in float32.

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


def mix(cached: Tensor, computed: Tensor, score: Tensor) -> Tensor:
    """Return `r * computed + (1 - r) * cached`.

    The result is differentiable in r and in `computed`.
    """
    if computed.dtype == score.dtype:
        return torch.lerp(cached, computed, score)
    mixed: Tensor = _Mix.apply(cached, computed, score)
    return mixed
