"""Conditioning of all steps of a trajectory, computed when it is needed."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, overload

C = TypeVar("C")


class StepConditionings(Sequence[C], Generic[C]):
    """The conditioning of every step, computed on access from the last step down."""

    def __init__(
        self,
        make: Callable[[Sequence[float]], list[C]],
        timesteps: Sequence[float],
        *,
        at_once: int = 1,
        lookahead: int = 0,
    ) -> None:
        """Compute nothing yet: conditionings are made when they are asked for.

        Args:
            make: computes the conditionings of some timesteps.
            at_once: number of steps that are computed together.
            lookahead: number of steps around the current one whose conditioning stays cached.
        """
        self._make, self._timesteps = make, timesteps
        self._at_once, self._lookahead = at_once, lookahead
        self._made: dict[int, C] = {}

    def looking_ahead(self, steps: int) -> "StepConditionings[C]":
        """Return a copy that keeps conditionings of `steps` steps around the current."""
        return StepConditionings(self._make, self._timesteps, at_once=self._at_once, lookahead=steps)

    def __len__(self) -> int:
        return len(self._timesteps)

    @overload
    def __getitem__(self, index: int) -> C: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[C]: ...
    def __getitem__(self, index: int | slice) -> C | Sequence[C]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]  # from the end where it is negative, IndexError beyond
        if index not in self._made:
            wanted = range(max(0, index + 1 - self._at_once), index + 1)
            steps = [i for i in wanted if i not in self._made]
            made = self._make([self._timesteps[i] for i in steps])
            near = range(index - self._lookahead, index + self._lookahead + 1)
            kept = {i: one for i, one in self._made.items() if i in near}
            self._made = kept | dict(zip(steps, made, strict=True))
        return self._made[index]
