"""Keep the outputs of units, tensors or tuples of them, in `BranchCache`s."""

from typing import Any

from torch import Tensor
from torch.utils import _pytree

from harmonica.core.cache import BranchCache, Reuse
from harmonica.core.plan import Correction, Forecast

OF_OUTPUT = ""
"""In place of a unit: the transformer itself."""
_TENSOR = object()  # marks the place of a tensor in an output


class UnitStore:
    """Holds the last outputs of every kept unit, for the calls of one trajectory."""

    def __init__(
        self,
        branch_of: dict[str, int],
        reuse: Reuse = "hold",
        learned: Forecast | None = None,
        correction: Correction | None = None,
    ) -> None:
        """Keep no value yet.

        Args:
            branch_of: the branch of each unit that is kept.
        """
        self.branch_of, self.reuse, self.learned = branch_of, reuse, learned
        self.correction = correction if reuse == "forecast" else None
        self._outputs: BranchCache | None = None
        self._caches: dict[str, BranchCache] = {}
        self._layouts: dict[str, tuple[list[Any], Any]] = {}

    def __len__(self) -> int:
        return len(self._caches)

    def __contains__(self, unit: str) -> bool:
        return unit in self._caches

    def read(self, unit: str, step: int) -> Any:
        """Return the unit's output for a step at which it is reused."""
        cache, (leaves, layout) = self._caches[unit], self._layouts[unit]
        places = iter(range(len(leaves)))
        values = [cache.read(next(places), step) if leaf is _TENSOR else leaf for leaf in leaves]
        return _pytree.tree_unflatten(values, layout)

    def write(self, unit: str, step: int, output: Any) -> None:
        """Keep a unit's output of `step`."""
        leaves, layout = _pytree.tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if unit not in self._caches:
            self._caches[unit] = self.new_cache(unit, len(tensors))
        marks = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._layouts[unit] = marks, layout
        for place, tensor in enumerate(tensors):
            self._caches[unit].write(place, step, tensor)

    def corrected(self, step: int, output: Any) -> Any:
        """Return the transformer's output with every tensor of it corrected.

        See `harmonica.core.correction`.
        """
        leaves, layout = _pytree.tree_flatten(output)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if self._outputs is None:
            self._outputs = self.new_cache(OF_OUTPUT, len(places))
        for number, place in enumerate(places):
            self._outputs.write(number, step, leaves[place])
            leaves[place] = self._outputs.read(number, step)
        return _pytree.tree_unflatten(leaves, layout)

    def new_cache(self, unit: str, count: int) -> BranchCache:
        """Return the empty cache of a unit that gives so many tensors."""
        return BranchCache(count, self.reuse, self.forecast_of(unit, count))

    def forecast_of(self, unit: str, count: int) -> Forecast | None:
        """Return the weights of a unit's tensors.

        They are its branch's, or those that correct the transformer's output.
        """
        if unit == OF_OUTPUT:
            return None if self.correction is None else tuple((row,) * count for row in self.correction)
        if self.learned is None:
            return None
        return tuple((row[self.branch_of[unit]],) * count for row in self.learned)

    def copy(self) -> "UnitStore":
        """Return a second one that shares the values, which are never overwritten."""
        twin = UnitStore(self.branch_of, self.reuse, self.learned, self.correction)
        twin._outputs = self._outputs and self._outputs.copy()
        twin._caches = {unit: cache.copy() for unit, cache in self._caches.items()}
        twin._layouts = dict(self._layouts)
        return twin

    @property
    def nbytes(self) -> int:
        """Return the bytes of the units' kept values."""
        return sum(cache.nbytes for cache in self._caches.values())
