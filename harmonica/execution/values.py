"""Branch values kept between steps, and the output a reused branch makes of them.

Shapes: N batch, L tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def extrapolate(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return `v1 + w1 (v1 - v2) + w2 (v2 - v3) + ...` of values, newest first.

    Values are (N, L, D); weights without a value are ignored.
    """
    if len(values) == 1 or not weights:
        return values[0]
    forecast = torch.lerp(values[1], values[0], 1.0 + weights[0])
    for newer, older, weight in zip(values[1:], values[2:], weights[1:]):
        forecast = torch.add(forecast, newer - older, alpha=weight)
    return forecast


@dataclass(frozen=True, slots=True)
class KeptValues:
    """The values of one branch that a step reuses.

    Their sum is `coefficients[k] * values[k]` over k.
    """

    values: tuple[Tensor, ...]
    """Newest first, each (N, L, D)."""
    coefficients: tuple[float, ...]
    """One a value; `(1.0,)` holds the last one."""

    @classmethod
    def of(cls, values: Sequence[Tensor], weights: Sequence[float]) -> "KeptValues":
        """Return the sum that `extrapolate` makes of the same arguments."""
        if len(values) == 1 or not weights:
            return cls((values[0],), (1.0,))
        used = weights[: len(values) - 1]
        coefficients = [1.0, *[0.0] * len(used)]
        for k, weight in enumerate(used):
            coefficients[k] += weight
            coefficients[k + 1] -= weight
        return cls(tuple(values[: len(coefficients)]), tuple(coefficients))


class Scalars:
    """Numbers as tensors on a device, each made once a trajectory by the device.

    As a number, a coefficient would be compiled into the graph, or each would be another graph. A fill is no
    copy from the host, so it may be captured.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[float, torch.device], Tensor] = {}

    def of(self, value: float, device: torch.device) -> Tensor:
        """Return a float32 tensor () with this value."""
        made = self._made.get((value, device))
        if made is None:
            made = torch.full((), value, dtype=torch.float32, device=device)
            self._made[value, device] = made
        return made


class ValueStore(Protocol):
    """The interface of the cache that runners use.

    It is implemented by `harmonica.core.cache.BranchCache`.
    """

    scalars: Scalars

    def read(self, branch: int, step: int) -> Tensor:
        """Return the branch's value (N, L, D) for a step at which it is reused."""

    def kept(self, branch: int, step: int) -> KeptValues:
        """Return the values that `read` adds up, without adding."""

    def write(self, branch: int, step: int, value: Tensor) -> None:
        """Keep the value of a branch at `step`."""
