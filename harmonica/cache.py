"""What a branch hands out when it is not computed: its last value, or a forecast from its last two."""

import math
from typing import Literal

import torch
from torch import Tensor

from harmonica.models.base import BranchedTransformer

Reuse = Literal["hold", "forecast"]


def cache_bytes(model: BranchedTransformer, reuse: Reuse, *, is_guided: bool) -> int:
    """Of one image's cache: every branch's last value, or last two, of both halves under guidance."""
    values = len(model.branches) * (1 + (reuse == "forecast")) * (1 + is_guided)
    return values * math.prod(model.value_shape) * model.dtype.itemsize


class BranchCache:
    """Last computed value of every branch of one batch; one cache serves one trajectory.

    `hold` hands the value out as it is (the paper). `forecast` extrapolates it linearly along the
    steps, `v + (v - v') * k / g` with k the steps since v was computed and g those between v' and v;
    with one value known it holds. Values are detached: no gradient crosses a step.
    """

    def __init__(self, num_branches: int, reuse: Reuse = "hold") -> None:
        self.reuse = reuse
        self._last: list[tuple[int, Tensor] | None] = [None] * num_branches
        self._before: list[tuple[int, Tensor] | None] = [None] * num_branches

    def read(self, branch: int, step: int) -> Tensor:
        """The branch's value (N, L, D) for a step at which it is reused."""
        last, before = self._last[branch], self._before[branch]
        assert last is not None, "step T-1 computes every branch, so the cache is never empty"
        if self.reuse == "hold" or before is None:
            return last[1]
        # Steps count down: last[0] > step, before[0] > last[0].
        weight = (last[0] - step) / (before[0] - last[0])
        return torch.lerp(before[1], last[1], 1.0 + weight)

    def write(self, branch: int, step: int, value: Tensor) -> None:
        """Keep the value a branch had at `step`."""
        if self.reuse == "forecast":
            self._before[branch] = self._last[branch]
        self._last[branch] = (step, value.detach())

    @property
    def nbytes(self) -> int:
        """Of the values it holds."""
        kept = {value[1].data_ptr(): value[1].nbytes for value in (*self._last, *self._before) if value}
        return sum(kept.values())

    def copy(self) -> "BranchCache":
        """A second cache with the same contents; values are shared, never written in place."""
        twin = BranchCache(len(self._last), self.reuse)
        twin._last, twin._before = list(self._last), list(self._before)
        return twin
