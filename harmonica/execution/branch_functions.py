"""The functions that are compiled: a branch with all that surrounds it.

Each is one function of tensors and the branch.

Each is a graph a kind of branch (`harmonica.execution.compiled`).
Shapes: N batch, L tokens, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harmonica.execution.mixing import mix
from harmonica.models.base import Branch, add_gated


def compute(
    branch: Branch, hidden_NLD: Tensor, gate_N1D: Tensor | None, inputs: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Compute and merge a branch; returns the next hidden state and y."""
    y_NLD = branch.run(hidden_NLD, *inputs)
    return add_gated(hidden_NLD, gate_N1D, y_NLD), y_NLD


def add_to(
    totals_NLD: Sequence[Tensor], gates_N1D: Sequence[Tensor | None], weights: Sequence[Tensor], y_NLD: Tensor
) -> None:
    """Add shares of y to sums of later steps, in place."""
    for total_NLD, gate_N1D, weight in zip(totals_NLD, gates_N1D, weights, strict=True):
        share_NLD = weight.to(total_NLD.dtype) * y_NLD.to(total_NLD.dtype)
        total_NLD.add_(share_NLD if gate_N1D is None else share_NLD * gate_N1D)


def compute_and_add(
    branch: Branch,
    hidden_NLD: Tensor,
    gate_N1D: Tensor | None,
    inputs: tuple[Any, ...],
    totals_NLD: Sequence[Tensor],
    gates_N1D: Sequence[Tensor | None],
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Compute and merge a branch, and add y to sums of later steps."""
    y_NLD = branch.run(hidden_NLD, *inputs)
    add_to(totals_NLD, gates_N1D, weights, y_NLD)
    return add_gated(hidden_NLD, gate_N1D, y_NLD), y_NLD


def reuse(
    hidden_NLD: Tensor,
    gates_N1D: Sequence[Tensor | None],
    values: Sequence[Sequence[Tensor]],
    coefficients: Sequence[Sequence[Tensor]],
) -> Tensor:
    """Merge what some branches kept; returns the next hidden state."""
    for gate_N1D, some, factors in zip(gates_N1D, values, coefficients, strict=True):
        hidden_NLD = add_gated(hidden_NLD, gate_N1D, _sum(some, factors, hidden_NLD.dtype))
    return hidden_NLD


def _sum(values: Sequence[Tensor], factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Add up kept values in a precision.

    Without factors the last value is returned as it is held.
    """
    total_NLD = values[0]
    for k, (factor, value) in enumerate(zip(factors, values)):
        share_NLD = factor * value.to(dtype)
        total_NLD = total_NLD + share_NLD if k else share_NLD
    return total_NLD


def mix_in(
    branch: Branch,
    hidden_NLD: Tensor,
    gate_N1D: Tensor | None,
    inputs: tuple[Any, ...],
    values: Sequence[Tensor],
    factors: Sequence[Tensor],
    score: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute a branch, mix it with its kept value and merge the mix."""
    computed = branch.run(hidden_NLD, *inputs)
    y_NLD = mix(_sum(values, factors, computed.dtype), computed, score)
    return add_gated(hidden_NLD, gate_N1D, y_NLD), y_NLD
