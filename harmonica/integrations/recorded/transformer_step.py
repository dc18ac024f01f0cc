"""A call of a transformer at one step of a trajectory, and the ways to run it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from harmonica.integrations.recorded.unit_store import UnitStore
from harmonica.integrations.recorded.view import RecordedTransformer


@dataclass(frozen=True)
class TransformerStep:
    """A call of a transformer at one step."""

    view: RecordedTransformer
    i: int
    kept: UnitStore
    """The call's values; empty where it has to compute everything."""
    shapes: dict[str, Any]
    """The call's stand-ins: what units of the trajectory returned."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def planned(self, row: Any, *, recompute: bool = False) -> Any:
        """Run the call under a row of a plan."""
        return self.view.planned(
            row, self.kept, self.i, self.shapes, self.args, self.kwargs, recompute=recompute
        )

    def full(self, *, recompute: bool = False) -> Any:
        """Run the call with every branch computed and kept."""
        return self.planned((True,) * len(self.view.branches), recompute=recompute)

    def plain(self) -> Any:
        """Run the transformer's own forward; nothing is kept."""
        return self.view.forward(*self.args, **self.kwargs)

    def mixed(self, scores_B: Tensor, refresh_row: Any) -> Any:
        """Run the call with the scores of a router."""
        return self.view.mixed(scores_B, refresh_row, self.kept, self.i, self.args, self.kwargs)
