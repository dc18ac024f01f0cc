"""Ways to need less memory for the gradients of a whole trajectory."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from harmonica.execution.offloading import ActivationOffloading


@dataclass(frozen=True)
class MemorySavings:
    """Ways to need less memory, which leave the results as they are."""

    recompute: bool = False
    """The backward pass computes branches again, in place of keeping what they need."""
    offload: bool = False
    """What the backward pass needs is kept in the host's memory."""

    def offloading(self, weights: Iterable[Tensor]) -> ActivationOffloading | None:
        """Return the context of a forward pass, where anything is offloaded.

        Args:
            weights: of the model, which stay where they are.
        """
        return ActivationOffloading(weights) if self.offload else None


NO_SAVINGS = MemorySavings()


@contextmanager
def advised(*cures: str) -> Iterator[None]:
    """Say with an error of too little memory what helps.

    Args:
        cures: what has not been given yet.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if cures:
            error.add_note(f"The gradients of a whole trajectory do not fit: give {', or '.join(cures)}.")
        raise
