"""A DiT's modulations: of one step, and of all steps of a trajectory.

Shapes: N batch, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import overload

from torch import Tensor

ROWS_AT_ONCE = 64
"""Of which modulations are made; for fewer, reading their weights takes longer than multiplying by them."""


@dataclass(frozen=True, slots=True)
class DiTConditioning:
    """All modulations of one step, made once for every block."""

    blocks: list[tuple[Tensor, ...]] = field(repr=False)
    """Per block: shift, scale, gate of attention, then of the MLP, each (N, D)."""
    final: tuple[Tensor, ...] = field(repr=False)
    """Shift and scale (N, D) of the final layer."""

    def rows(self, part: slice) -> "DiTConditioning":
        """Of some rows."""
        return DiTConditioning(
            [tuple(each[part] for each in block) for block in self.blocks],
            tuple(each[part] for each in self.final),
        )


class StepConditionings(Sequence[DiTConditioning]):
    """The conditioning of every step of a trajectory, made some steps at a time, from the last step down.

    Modulations are a third of a DiT's weights, and a step of few rows needs no more of the machine than
    to read them. Several steps' rows together read them once.
    """

    def __init__(
        self,
        make: Callable[[Tensor, Sequence[float]], list[DiTConditioning]],
        label_N: Tensor,
        timesteps: Sequence[float],
    ) -> None:
        """
        Args:
            make: a model's `conditionings`.
        """
        self._make, self._label_N, self._timesteps = make, label_N, timesteps
        self._at_once = max(1, ROWS_AT_ONCE // len(label_N))
        self._made: dict[int, DiTConditioning] = {}

    def __len__(self) -> int:
        return len(self._timesteps)

    @overload
    def __getitem__(self, index: int) -> DiTConditioning: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[DiTConditioning]: ...
    def __getitem__(self, index: int | slice) -> DiTConditioning | Sequence[DiTConditioning]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        if index not in self._made:
            steps = range(max(0, index + 1 - self._at_once), index + 1)
            timesteps = [self._timesteps[i] for i in steps]
            made = self._make(self._label_N, timesteps)
            self._made = dict(zip(steps, made, strict=True))
        return self._made[index]
