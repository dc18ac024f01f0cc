"""Kernels that sum in another order, as those of other CPUs and of GPUs do: what is said of rounding can be
tested on any machine."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from harmonica.models.dit.model import DiT

_MARGIN = 3


def rounding_bound(model: DiT, num_steps: int, guidance_scale: float) -> float:
    """What the order of float32 sums may change in a value of an image in [-1, 1].

    The terms of all sums that a value goes through, one after another, round it by an epsilon at most, and
    these add up like a random walk; guidance weighs its two halves s and 1 - s.
    """
    config = model.config
    width, tokens = config.hidden_size, (config.sample_size // config.patch_size) ** 2
    # Modulation, queries, their products, means of values, and out; the MLP's in and out, which is 4 x wide.
    terms = width + width + config.attention_head_dim + tokens + width + width + 4 * width
    walk = math.sqrt(num_steps * config.num_layers * terms)
    return _MARGIN * torch.finfo(torch.float32).eps * walk * (2 * guidance_scale - 1)


@contextmanager
def summing(order: Callable[[int, int], Tensor]) -> Iterator[None]:
    """Matrix products in two parts, split at another place by the batch's size or the row's.

    Args:
        order: of the number of leading rows M of a product and its width K: for each row where its sum is
            split, (M,) in 0 to K.
    """
    linear = functional.linear

    def split(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        width = x.shape[-1]
        at_M = order(x.shape[0], width).view(-1, *[1] * (x.ndim - 1))
        is_first = torch.arange(width) < at_M
        first = linear(x * is_first, weight)
        return first + linear(x * ~is_first, weight, bias)

    functional.linear = split
    try:
        yield
    finally:
        functional.linear = linear


def by_batch(rows: int, width: int) -> Tensor:
    """As a library that picks its kernel by the shape."""
    return torch.full((rows,), 1 + rows % (width - 1))


def by_slot(rows: int, width: int) -> Tensor:
    """As one that treats what is left of the last block of rows in another way."""
    return 1 + torch.arange(rows) % (width - 1)
