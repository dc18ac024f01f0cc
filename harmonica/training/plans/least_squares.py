"""Ridge regression with groups of like weights.

The weights of a group are expected to move together: a priori,
each is the sum of a part that its group shares and one of its own, with variances `SHARED` and 1. With few
rows the solution moves the groups, with many rows each weight by itself (ridge regression as a Gaussian
prior: Hastie, Tibshirani and Friedman 2009, section 3.4.1).
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

SHARED = 10.0
"""Prior variance of what the weights of a group share, next to that of each one's own part."""

_TINY = 1e-30
FIT_RIDGES = (0.02, 0.1, 0.5, 2.5, 12.0, 60.0)
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

    def solve(self, ridge: float, penalty_PP: Tensor, corrects: Sequence[bool]) -> Tensor:
        """Return the solution, a change of the weights (P,); see `ridge_solution`.

        Args:
            penalty_PP: what `penalty_of` returned for the weights.
        """
        return ridge_solution(self.matrix_PP, self.right_P, ridge, penalty_PP, corrects)


def ridge_solution(
    matrix_PP: Tensor, right_P: Tensor, ridge: float, penalty_PP: Tensor, corrects: Sequence[bool]
) -> Tensor:
    """Solve normal equations with a penalty.

    Returns the change of the weights (P,).

    Where the matrix is zero, as that of silent branches, nothing changes.

    Args:
        ridge: weight of the penalty, relative to the mean diagonal of the forecasts' weights.
        corrects: of each weight, whether it is a correction's (P). One moves the whole output, and is
            counted in units in which its diagonal is in the mean that of a forecast's.
    """
    diagonal_P = matrix_PP.diagonal().clamp_min(_TINY)
    is_correction_P = torch.tensor(corrects, dtype=torch.bool)
    scale_P = torch.ones_like(diagonal_P)
    if any(corrects) and not all(corrects):
        unit = diagonal_P[~is_correction_P].mean() / diagonal_P[is_correction_P].mean()
        scale_P[is_correction_P] = unit.sqrt()
    scaled_PP = matrix_PP * scale_P[:, None] * scale_P
    shift = ridge * scaled_PP.diagonal().mean().clamp_min(_TINY)
    change_P: Tensor = torch.linalg.solve(scaled_PP + shift * penalty_PP, -right_P * scale_P)
    return change_P * scale_P


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
