"""Kernels of a CPU that is not here: the same products, norms and attention, their sums in another order.

Which order a library sums in depends on the processor, on the number of threads and on the shapes: Intel's
MKL, for one, multiplies a batch of 1 with another kernel than a batch of 2. Here the order is drawn from
the operation and the shapes of its operands alone: equal shapes have equal bits, while another batch size,
or another place in the batch, has its last bits otherwise. What a test calls equal bit for bit has to hold
under this, and so has every tolerance.
"""

import functools
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., Any]


def install() -> torch.library.Library:
    """Replaces kernels of this process, for as long as the result is referred to."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # torch warns of what is meant here
        for name, make in _REPLACEMENTS.items():
            kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
            other = make(functools.partial(_call, kernel), name)
            library.impl(name, other, "CPU", with_keyset=True, allow_override=True)
    return library


def _call(kernel: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
    return kernel.call_boxed(keys, *args, **kwargs)


@functools.cache
def _order(name: str, shapes: tuple[tuple[int, ...], ...], size: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(repr((name, shapes)).encode()))
    return torch.randperm(size, generator=generator)


def _shuffle(matrix: Tensor, order: Tensor, dim: int) -> Tensor:
    """As it lies in memory, since a transposed one has kernels of its own."""
    if matrix.stride(-1) == 1:
        return matrix.index_select(dim, order)
    return matrix.mT.index_select(-3 - dim, order).mT


def _product(kernel: Kernel, name: str) -> Kernel:
    """`mm` and `bmm` of (..., M, K) and (..., K, N); `addmm` and `baddbmm`, which have a sum before them.

    The last third of the M rows has an order of its own, as rows have that fill no tile or are another
    thread's; not so in half precision, whose products are slow enough.
    """

    def other(keys: Any, *operands: Tensor, **factors: float) -> Tensor:
        *total, a, b = operands
        results = []
        for part in ("first", "last"):
            order = _order(name + part, (tuple(a.shape), tuple(b.shape)), a.shape[-1])
            shuffled = _shuffle(a, order, -1), _shuffle(b, order, -2)
            results.append(kernel(keys, *total, *shuffled, **factors))
            if a.dtype in (torch.float16, torch.bfloat16):
                return results[0]
        first = a.shape[-2] - a.shape[-2] // 3
        return torch.cat([results[0][..., :first, :], results[1][..., first:, :]], dim=-2)

    return other


def _attention(kernel: Kernel, name: str) -> Kernel:
    def other(
        keys: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        shapes = tuple(q.shape), tuple(k.shape)
        width = _order(name, shapes, q.shape[-1])
        q, k = q.index_select(-1, width), k.index_select(-1, width)
        if not is_causal:
            place = _order(name, shapes, k.shape[-2])
            k, v = k.index_select(-2, place), v.index_select(-2, place)
            if attn_mask is not None and attn_mask.shape[-1] == len(place):
                attn_mask = attn_mask.index_select(-1, place)
        return kernel(keys, q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)

    return other


def _layer_norm(kernel: Kernel, name: str) -> Kernel:
    def other(
        keys: Any, x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if len(shape) > 1:
            return kernel(keys, x, shape, weight, bias, eps)
        order = _order(name, (tuple(x.shape),), shape[0])
        weight, bias = (each if each is None else each[order] for each in (weight, bias))
        y, mean, deviation = kernel(keys, x.index_select(-1, order), shape, weight, bias, eps)
        return y.index_select(-1, order.argsort()), mean, deviation

    return other


def _convolution(kernel: Kernel, name: str) -> Kernel:
    def other(keys: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        if rest[-1] == 1:  # groups
            order = _order(name, (tuple(x.shape), tuple(weight.shape)), x.shape[1])
            x, weight = x.index_select(1, order), weight.index_select(1, order)
        return kernel(keys, x, weight, bias, *rest)

    return other


_REPLACEMENTS: dict[str, Callable[[Kernel, str], Kernel]] = {
    "mm": _product,
    "bmm": _product,
    "addmm": _product,
    "baddbmm": _product,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "native_layer_norm": _layer_norm,
    "mkldnn_convolution": _convolution,
}
