"""The ridge is chosen for rows that were not fitted."""

import torch

from harmonica.training.plans.least_squares import RIDGES, NormalEquations, choose_ridge, sum_of


def folds_of(noise: float, weights: list[float], rows: int = 12) -> list[NormalEquations]:
    """Four folds of few rows: a residual that moving the weights by -`weights` would take away, and noise."""
    generator, folds = torch.Generator().manual_seed(0), []
    for _ in range(4):
        jacobian = torch.randn(rows, len(weights), generator=generator, dtype=torch.float64)
        residual = jacobian @ torch.tensor(weights, dtype=torch.float64)
        residual += noise * torch.randn(rows, generator=generator, dtype=torch.float64)
        fold = NormalEquations(len(weights))
        fold.add(jacobian.T @ jacobian, jacobian.T @ residual)
        folds.append(fold)
    return folds


def test_without_noise_the_least_ridge_is_best_and_finds_the_weights():
    folds = folds_of(0.0, [0.5, -1.0, 2.0])
    chosen = choose_ridge(folds)
    assert chosen.ridge == min(RIDGES) and chosen.promise < 0
    found = sum_of(folds).solve(chosen.ridge)
    torch.testing.assert_close(found, torch.tensor([-0.5, 1.0, -2.0]).double(), rtol=0.01, atol=0)


def test_noise_alone_is_not_fitted():
    folds = folds_of(1.0, [0.0] * 10, rows=6)
    chosen = choose_ridge(folds)
    assert chosen.ridge == max(RIDGES) and chosen.promise > 0, "the rows left out get worse"
    own = sum_of(folds)
    assert own.change_of_error(own.solve(min(RIDGES))) < 0, "though the rows fitted get better"


def test_the_sum_is_that_of_all_rows():
    folds = folds_of(0.3, [1.0, 2.0])
    total = sum_of(folds)
    torch.testing.assert_close(total.matrix_PP, sum(fold.matrix_PP for fold in folds))
    torch.testing.assert_close(total.right_P, sum(fold.right_P for fold in folds))
