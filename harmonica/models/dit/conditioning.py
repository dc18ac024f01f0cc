"""A DiT's modulations of one step.

Shapes: N batch, D width.
"""

from dataclasses import dataclass, field

from torch import Tensor

ROWS_AT_ONCE = 64
"""Number of rows that modulations are computed for together. They are a third of a DiT's weights, and for
fewer rows, reading the weights takes longer than multiplying by them."""


@dataclass(frozen=True, slots=True)
class DiTConditioning:
    """All modulations of one step, for every block and the final layer."""

    blocks: list[tuple[Tensor, ...]] = field(repr=False)
    """Per block: shift, scale, gate of attention, then of the MLP, each (N, D)."""
    final: tuple[Tensor, ...] = field(repr=False)
    """Shift and scale (N, D) of the final layer."""

    def rows(self, part: slice) -> "DiTConditioning":
        """Return the modulations of some rows."""
        return DiTConditioning(
            [tuple(each[part] for each in block) for block in self.blocks],
            tuple(each[part] for each in self.final),
        )
