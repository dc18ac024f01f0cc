"""Ridge regression whose ridge is chosen by cross-validation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""The ridges to choose from, relative to the mean diagonal of the normal equations."""


class NormalEquations:
    """The normal equations of least squares in P weights, as sums over rows."""

    def __init__(self, count: int) -> None:
        self.matrix_PP = torch.zeros(count, count, dtype=torch.float64)
        self.right_P = torch.zeros(count, dtype=torch.float64)

    def add(self, matrix_PP: Tensor, right_P: Tensor) -> None:
        """Add the sums (P, P) and (P,) of more rows."""
        self.matrix_PP += matrix_PP
        self.right_P += right_P

    def solve(self, ridge: float) -> Tensor:
        """Return the solution, a change of the weights (P,)."""
        shift = ridge * self.matrix_PP.diagonal().mean().clamp_min(1e-30)
        damped_PP = self.matrix_PP + shift * torch.eye(len(self.right_P)).double()
        change_P: Tensor = torch.linalg.solve(damped_PP, -self.right_P)
        return change_P

    def change_of_error(self, weights_P: Tensor) -> float:
        """Return the change of the sum of squares by this change of weights.

        Below 0 is better.
        """
        return float(weights_P @ self.matrix_PP @ weights_P + 2 * weights_P @ self.right_P)


def sum_of(equations: Sequence[NormalEquations]) -> NormalEquations:
    """Return the normal equations of the rows of all parts.

    There is at least one part.
    """
    total = NormalEquations(len(equations[0].right_P))
    for each in equations:
        total.add(each.matrix_PP, each.right_P)
    return total


@dataclass(frozen=True, slots=True)
class RidgeChoice:
    """The ridge with the least error on rows left out, and that error's change."""

    ridge: float
    promise: float
    """Change of the sum of squares over the rows left out; below 0 is better."""


def choose_ridge(folds: Sequence[NormalEquations]) -> RidgeChoice:
    """Choose the ridge by leaving out each of the folds in turn.

    There are at least two.
    """
    rest = [sum_of([fold for fold in folds if fold is not left_out]) for left_out in folds]

    def promise(ridge: float) -> float:
        pairs = zip(folds, rest, strict=True)
        return sum(fold.change_of_error(others.solve(ridge)) for fold, others in pairs)

    promises = {ridge: promise(ridge) for ridge in RIDGES}
    best = min(RIDGES, key=promises.__getitem__)
    return RidgeChoice(best, promises[best])
