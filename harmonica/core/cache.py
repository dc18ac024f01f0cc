"""The branch cache: reuses the last value, or a forecast from the last values."""

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from harmonica.core.plan import Correction, Forecast, Plan
from harmonica.execution.values import KeptValues, Scalars, extrapolate
from harmonica.models.base import BranchedTransformer

Reuse = Literal["hold", "forecast"]


def values_kept(reuse: Reuse, forecast_order: int = 1) -> int:
    """Return the number of cached values a branch; a forecast adds its order."""
    return 1 if reuse == "hold" else 1 + forecast_order


def cache_bytes(model: BranchedTransformer, reuse: Reuse, *, is_guided: bool, forecast_order: int = 1) -> int:
    """Return the bytes of one image's cache; guidance doubles them."""
    values = len(model.branches) * values_kept(reuse, forecast_order) * (1 + is_guided)
    return values * math.prod(model.value_shape) * model.dtype.itemsize


class BranchCache:
    """The last computed values of every branch, for one trajectory of one batch.

    `hold` reuses the last value unchanged (the paper). `forecast` extrapolates it linearly along the
    steps, `v + (v - v') * k / g` with k the steps since v was computed and g those between v' and v, or
    with the plan's learned weights. With one cached value it is reused unchanged. Values are detached: no
    gradient crosses a step.
    """

    outputs: "BranchCache | None" = None
    """The model's own last outputs, as those of a single branch, where a plan corrects them
    (`harmonica.core.correction`)."""

    def __init__(
        self,
        num_branches: int,
        reuse: Reuse = "hold",
        learned: Forecast | None = None,
        correction: Correction | None = None,
    ) -> None:
        self.reuse, self._learned = reuse, learned if reuse == "forecast" else None
        if correction is not None and reuse == "forecast":
            self.outputs = self._of_outputs(tuple((row,) for row in correction))
        order = len(learned[0][0]) if learned else 1
        self._depth = values_kept(reuse, order)
        self._kept: list[tuple[tuple[int, Tensor], ...]] = [()] * num_branches
        self.scalars = Scalars()
        """Coefficients of forecasts on the device."""

    @classmethod
    def under(cls, plan: Plan, reuse: Reuse) -> "BranchCache":
        """Return the empty cache of a trajectory, with a place for each column of a plan."""
        return cls(plan.num_branches, reuse, plan.forecast, plan.correction)

    def _of_outputs(self, learned: Forecast) -> "BranchCache":
        """Return the cache of the model's outputs, T x 1 weights of which correct them."""
        return BranchCache(1, "forecast", learned)

    def read(self, branch: int, step: int) -> Tensor:
        """Return the branch's value (N, L, D) for a step at which it is reused."""
        kept = self._kept[branch]
        assert len(kept) > 0, "step T-1 computes every branch, so the cache is never empty"
        if len(kept) == 1:
            return kept[0][1]
        return extrapolate([value for _, value in kept], self.weights(branch, step))

    def kept(self, branch: int, step: int) -> KeptValues:
        """Return the values that `read` adds up, without adding."""
        values = [value for _, value in self._kept[branch]]
        return KeptValues.of(values, self.weights(branch, step) if len(values) > 1 else ())

    def weights(self, branch: int, step: int) -> Sequence[float]:
        """Return the weights of the differences between last values, newest first."""
        if self._learned is not None:
            return self._learned[step][branch]
        (last, _), (before, _) = self._kept[branch][:2]
        return ((last - step) / (before - last),)  # steps count down: before > last > step

    def write(self, branch: int, step: int, value: Tensor) -> None:
        """Cache the value of a branch at `step`."""
        self._keep(branch, step, value.detach())

    def _keep(self, branch: int, step: int, value: Tensor) -> None:
        self._kept[branch] = ((step, value), *self._kept[branch][: self._depth - 1])

    @property
    def nbytes(self) -> int:
        """Bytes of the branches' cached values."""
        values = (value for kept in self._kept for _, value in kept)
        return sum({value.data_ptr(): value.nbytes for value in values}.values())

    def copy(self) -> "BranchCache":
        """Return a second cache that shares the values, which are never overwritten."""
        twin = BranchCache(len(self._kept), self.reuse, self._learned)
        twin._kept, twin.scalars = list(self._kept), self.scalars
        twin.outputs = self.outputs and self.outputs.copy()
        return twin
