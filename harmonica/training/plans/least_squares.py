"""Ridge regression with groups of like weights.

The ridge is chosen by cross-validation. The weights of a group are expected to move together: a priori,
each is the sum of a part that its group shares and one of its own, with variances `SHARED` and 1. With few
rows the solution moves the groups, with many rows each weight by itself (ridge regression as a Gaussian
prior: Hastie, Tibshirani and Friedman 2009, section 3.4.1).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHARED = 10.0
"""Prior variance of what the weights of a group share, next to that of each one's own part."""

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

    def solve(self, ridge: float, penalty_PP: Tensor) -> Tensor:
        """Return the solution, a change of the weights (P,).

        Args:
            ridge: weight of the penalty, relative to the mean diagonal.
            penalty_PP: what `penalty_of` returned for the weights.
        """
        shift = ridge * self.matrix_PP.diagonal().mean().clamp_min(1e-30)
        change_P: Tensor = torch.linalg.solve(self.matrix_PP + shift * penalty_PP, -self.right_P)
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


def penalty_of(groups: Sequence[Hashable]) -> Tensor:
    """Return the penalty (P, P) of a change of the weights.

    It is the inverse of the prior covariance, `1 + SHARED * 1 1^T` within a group of n weights and none
    between groups, hence `1 - SHARED / (1 + n SHARED) * 1 1^T`.

    Args:
        groups: the group of each weight (P).
    """
    numbers: dict[Hashable, int] = {}
    group_P = torch.tensor([numbers.setdefault(group, len(numbers)) for group in groups], dtype=torch.long)
    is_same_PP = (group_P[:, None] == group_P[None]).double()
    size_P = is_same_PP.sum(1)
    return (
        torch.eye(len(group_P), dtype=torch.float64) - is_same_PP * (SHARED / (1 + SHARED * size_P))[:, None]
    )


def choose_ridge(folds: Sequence[NormalEquations], penalty_PP: Tensor) -> RidgeChoice:
    """Choose the ridge by leaving out each of the folds in turn.

    There are at least two.
    """
    rest = [sum_of([fold for fold in folds if fold is not left_out]) for left_out in folds]

    def promise(ridge: float) -> float:
        pairs = zip(folds, rest, strict=True)
        return sum(fold.change_of_error(others.solve(ridge, penalty_PP)) for fold, others in pairs)

    promises = {ridge: promise(ridge) for ridge in RIDGES}
    best = min(RIDGES, key=promises.__getitem__)
    return RidgeChoice(best, promises[best])
