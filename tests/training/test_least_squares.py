"""The ridge is chosen for rows that were not fitted."""

import torch

from harmonica.training.plans.least_squares import (
    RIDGES,
    SHARED,
    NormalEquations,
    choose_ridge,
    penalty_of,
    sum_of,
)


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
    alone_PP = penalty_of(range(3))
    chosen = choose_ridge(folds, alone_PP)
    assert chosen.ridge == min(RIDGES) and chosen.promise < 0
    found = sum_of(folds).solve(chosen.ridge, alone_PP)
    torch.testing.assert_close(found, torch.tensor([-0.5, 1.0, -2.0]).double(), rtol=0.01, atol=0)


def test_noise_alone_is_not_fitted():
    folds = folds_of(1.0, [0.0] * 10, rows=6)
    alone_PP = penalty_of(range(10))
    chosen = choose_ridge(folds, alone_PP)
    assert chosen.ridge == max(RIDGES) and chosen.promise > 0, "the rows left out get worse"
    own = sum_of(folds)
    assert own.change_of_error(own.solve(min(RIDGES), alone_PP)) < 0, "though the rows fitted get better"


def test_the_sum_is_that_of_all_rows():
    folds = folds_of(0.3, [1.0, 2.0])
    total = sum_of(folds)
    torch.testing.assert_close(total.matrix_PP, sum(fold.matrix_PP for fold in folds))
    torch.testing.assert_close(total.right_P, sum(fold.right_P for fold in folds))


def test_the_penalty_is_the_inverse_of_the_prior_covariance():
    shared = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]).double()
    covariance = torch.eye(4, dtype=torch.float64) + SHARED * shared
    torch.testing.assert_close(penalty_of(["a", "b", "a", "b"]) @ covariance, torch.eye(4).double())
    covariance = (1 + SHARED) * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(penalty_of("abc") @ covariance, torch.eye(3).double())
    assert penalty_of([]).shape == (0, 0)


def test_few_rows_move_a_group_together():
    """With fewer rows than weights, what a group shares is found from all of its columns."""
    folds, truth = folds_of(0.3, [0.5] * 24 + [-1.0] * 24, rows=6), torch.tensor([-0.5] * 24 + [1.0] * 24)
    missed = []
    for groups in (["a"] * 24 + ["b"] * 24, range(48)):
        penalty_PP = penalty_of(groups)
        found = sum_of(folds).solve(choose_ridge(folds, penalty_PP).ridge, penalty_PP)
        missed.append(float((found - truth).norm()))
    assert missed[0] < missed[1] / 2
