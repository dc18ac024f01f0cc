"""Least squares whose weights move in groups where the rows do not tell them apart."""

import torch

from harmonica.training.plans.least_squares import FIT_RIDGES, SHARED, NormalEquations, penalty_of


def equations_of(noise: float, weights: list[float], rows: int = 48) -> NormalEquations:
    """A residual that moving the weights by -`weights` would take away, and noise."""
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(rows, len(weights), generator=generator, dtype=torch.float64)
    residual = jacobian @ torch.tensor(weights, dtype=torch.float64)
    residual += noise * torch.randn(rows, generator=generator, dtype=torch.float64)
    equations = NormalEquations(len(weights))
    for part in range(0, rows, 5):  # sums over parts are those of all rows
        j, r = jacobian[part : part + 5], residual[part : part + 5]
        equations.add(j.T @ j, j.T @ r)
    return equations


def test_without_noise_a_small_ridge_finds_the_weights():
    equations = equations_of(0.0, [0.5, -1.0, 2.0])
    found = equations.solve(1e-9, penalty_of(range(3)), [False] * 3)
    torch.testing.assert_close(found, torch.tensor([-0.5, 1.0, -2.0]).double(), rtol=1e-6, atol=0)


def test_a_larger_ridge_moves_less():
    equations, penalty_PP = equations_of(1.0, [1.0, -1.0, 0.5, 0.5]), penalty_of("abcc")
    sizes = [float(equations.solve(ridge, penalty_PP, [False] * 4).norm()) for ridge in FIT_RIDGES]
    assert sizes == sorted(sizes, reverse=True)


def test_the_penalty_is_the_inverse_of_the_prior_covariance():
    shared = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]).double()
    covariance = torch.eye(4, dtype=torch.float64) + SHARED * shared
    torch.testing.assert_close(penalty_of(["a", "b", "a", "b"]) @ covariance, torch.eye(4).double())
    covariance = (1 + SHARED) * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(penalty_of("abc") @ covariance, torch.eye(3).double())
    assert penalty_of([]).shape == (0, 0)


def test_few_rows_move_a_group_together():
    """With half as many rows as weights, what a group shares is found from all of its columns."""
    equations = equations_of(0.3, [0.5] * 24 + [-1.0] * 24, rows=24)
    truth = torch.tensor([-0.5] * 24 + [1.0] * 24).double()
    missed = []
    for groups in (["a"] * 24 + ["b"] * 24, range(48)):
        moves = (equations.solve(ridge, penalty_of(groups), [False] * 48) for ridge in FIT_RIDGES)
        missed.append(min(float((each - truth).norm()) for each in moves))
    assert missed[0] < missed[1] / 2


def test_the_units_of_a_correction_change_nothing():
    """A weight that moves the image ten times as far is a tenth, under any ridge."""
    equations, corrects = equations_of(1.0, [1.0, -1.0, 0.5, 0.5]), [False, False, True, True]
    unit_P = torch.tensor([1.0, 1.0, 10.0, 10.0], dtype=torch.float64)
    other = NormalEquations(4)
    other.add(equations.matrix_PP * unit_P[:, None] * unit_P, equations.right_P * unit_P)
    penalty_PP = penalty_of("abcc")
    for ridge in FIT_RIDGES:
        moved_P, scaled_P = (each.solve(ridge, penalty_PP, corrects) for each in (equations, other))
        torch.testing.assert_close(scaled_P * unit_P, moved_P, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(other.solve(1.0, penalty_PP, [False] * 4) * unit_P, moved_P, rtol=0.1)
