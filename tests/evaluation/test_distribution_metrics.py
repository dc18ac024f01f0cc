"""Distances between sets of features: closed forms, loops, torchmetrics and torch-fidelity."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchmetrics.image.kid import poly_mmd

from harmonica.evaluation.bootstrap import resample_weights
from harmonica.evaluation.distribution_metrics import (
    class_information,
    frechet_resampled,
    in_manifold,
    inception_score,
    kernel_distances,
)
from harmonica.evaluation.feature_statistics import FeatureStatistics
from harmonica.evaluation.image_metrics import frechet_distance


def normal(rows: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def once(rows: int) -> Tensor:
    """Every image one time."""
    return torch.ones(1, rows, dtype=torch.float64)


def repeated(features: Tensor, weights: Tensor) -> Tensor:
    return features.repeat_interleave(weights.long(), dim=0)


@quick
@given(st.integers(0, 10**6), st.floats(-3, 3), st.integers(1, 8))
def test_frechet_of_a_shifted_set_is_the_squared_shift(seed: int, shift: float, size: int) -> None:
    x = normal(30, size, seed)
    (distance,) = frechet_resampled(x, x + shift, once(30)).tolist()
    assert distance == pytest.approx(size * shift**2, abs=1e-6)


def test_frechet_of_a_scaled_set_is_that_of_gaussians() -> None:
    x = normal(40, 3)
    expected = torch.linalg.eigvalsh(torch.cov(x.T)).sum().item() + x.mean(0).square().sum().item()
    (distance,) = frechet_resampled(x, 2 * x, once(40)).tolist()
    assert distance == pytest.approx(expected)


def test_frechet_of_resamples_is_that_of_the_images_in_them() -> None:
    x, y = normal(60, 5), normal(60, 5, seed=1) + 0.3
    weights = resample_weights(60, 4)
    fixed = FeatureStatistics.from_features(y)
    for row, both, one in zip(
        weights, frechet_resampled(x, y, weights), frechet_resampled(x, fixed, weights)
    ):
        drawn = FeatureStatistics.from_features(repeated(x, row))
        assert one.item() == pytest.approx(frechet_distance(drawn, fixed), abs=1e-7)
        twin = FeatureStatistics.from_features(repeated(y, row))
        assert both.item() == pytest.approx(frechet_distance(drawn, twin), abs=1e-7)


def test_kid_is_torchmetrics_for_sets_that_have_nothing_in_common() -> None:
    x, y = normal(1050, 7), normal(1050, 7, seed=1) + 0.2  # more than one block of a kernel
    (distance,) = kernel_distances(x, y, once(1050), same_rows=False).tolist()
    assert distance == pytest.approx(poly_mmd(x, y).item(), rel=1e-9)


def test_kid_of_resamples_by_loops_over_pairs() -> None:
    x, y, (weight,) = normal(9, 3), normal(9, 3, seed=1), resample_weights(9, 1)

    def mean(a: Tensor, b: Tensor, wa: Tensor, wb: Tensor, skip: bool) -> float:
        total = pairs = 0.0
        for i in range(len(a)):
            for j in range(len(b)):
                if not (skip and i == j):
                    total += (wa[i] * wb[j] * (a[i] @ b[j] / 3 + 1) ** 3).item()
                    pairs += (wa[i] * wb[j]).item()
        return total / pairs

    every = torch.ones(9, dtype=torch.float64)
    for same_rows, other in ((True, weight), (False, every)):
        expected = mean(x, x, weight, weight, True) + mean(y, y, other, other, True)
        expected -= 2 * mean(x, y, weight, other, same_rows)
        (distance,) = kernel_distances(x, y, weight[None], same_rows=same_rows).tolist()
        assert distance == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.0, 0.95])
def test_kid_of_one_distribution_is_0_in_the_mean_also_where_rows_are_alike(share: float) -> None:
    found = []
    for seed in range(300):
        common, a, b = (normal(20, 4, 3 * seed + k) for k in range(3))
        x, y = (share**0.5 * common + (1 - share) ** 0.5 * own for own in (a, b))
        found.append(kernel_distances(x, y, once(20), same_rows=True).item())
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found)) < 3 * error


@quick
@given(st.integers(0, 10**6), st.integers(5, 40))
def test_every_image_lies_in_the_manifold_of_its_own_set(seed: int, rows: int) -> None:
    x = normal(rows, 3, seed)
    assert in_manifold(x, x.flip(0)).all()
    assert not in_manifold(x + 1000, x).any()


def test_precision_and_recall_are_torch_fidelity_s() -> None:
    x, y = normal(1100, 6), normal(1050, 6, seed=1) * 0.8 + 0.3
    expected = calculate_precision_recall_full(x, y)
    found = [in_manifold(a, b).double().mean().item() for a, b in ((x, y), (y, x))]
    assert found == pytest.approx(expected, abs=1e-7)
    assert 0.2 < found[0] < found[1] < 1


def test_a_manifold_needs_neighbours() -> None:
    with pytest.raises(ValueError, match="3 images have no 3 neighbours"):
        in_manifold(normal(5, 2), normal(3, 2))


def test_inception_score_is_torch_fidelity_s() -> None:
    logits = normal(200, 10) * 2
    p, p_log_p = class_information(logits)
    found = inception_score(p.mean(0), p_log_p.mean()).item()
    expected = isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    assert found == pytest.approx(expected)


def test_inception_score_of_sure_classes_is_their_number_and_of_equal_images_one() -> None:
    for logits, expected in ((1000 * torch.eye(7), 7.0), (torch.ones(7, 1) * normal(1, 5), 1.0)):
        p, p_log_p = class_information(logits)
        assert inception_score(p.mean(0), p_log_p.mean()).item() == pytest.approx(expected)
