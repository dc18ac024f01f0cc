"""Metrics against numbers known on paper."""

import math

import pytest
import torch
from tolerances import MARGIN, roundoff

from harmonica.evaluation.feature_statistics import FeatureStatistics
from harmonica.evaluation.image_metrics import frechet_distance, label_accuracy, label_agreement, psnr


def gaussian(mean: list[float], covariance: list[list[float]]) -> FeatureStatistics:
    as_double = torch.float64
    return FeatureStatistics(
        torch.tensor(mean, dtype=as_double), torch.tensor(covariance, dtype=as_double), 9
    )


def test_psnr_is_per_image_over_a_range_of_two() -> None:
    reference = torch.zeros(3, 1, 28, 28)
    images = reference + torch.tensor([0.2, 0.02, 0.0])[:, None, None, None]
    values = psnr(images, reference)
    assert values.shape == (3,)
    torch.testing.assert_close(values[:2], torch.tensor([20.0, 40.0]))  # 10 log10(2^2 / 0.2^2)
    assert math.isinf(values[2])


def test_psnr_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 1, 28, 28\), their reference \(1, 1, 28, 28\)"):
        psnr(torch.zeros(2, 1, 28, 28), torch.zeros(1, 1, 28, 28))


def test_frechet_distance_of_commuting_gaussians() -> None:
    a = gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 4.0]])
    b = gaussian([3.0, 4.0], [[9.0, 0.0], [0.0, 16.0]])
    assert frechet_distance(a, b) == pytest.approx(25 + (1 - 3) ** 2 + (2 - 4) ** 2)


def test_frechet_distance_of_gaussians_that_do_not_commute() -> None:
    a = gaussian([0.0, 0.0], [[2.0, 1.0], [1.0, 2.0]])
    b = gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 4.0]])
    # For 2 x 2, tr sqrt(AB) = sqrt(tr AB + 2 sqrt(det AB)) = sqrt(10 + 2 sqrt 12).
    expected = 4 + 5 - 2 * math.sqrt(10 + 2 * math.sqrt(12))
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(b, a) == pytest.approx(expected)


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    features = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))  # a singular covariance
    statistics = FeatureStatistics.from_features(features)
    # Half of the 96 eigenvalues are 0 up to the rounding of the largest squared, 6^2; their roots are taken.
    near = MARGIN * 2 * 48 * (roundoff(torch.float64) * 96 * 36) ** 0.5
    assert 0 <= frechet_distance(statistics, statistics) < near


def test_frechet_distance_refuses_other_features() -> None:
    with pytest.raises(ValueError, match="1 and 2"):
        frechet_distance(gaussian([0.0], [[1.0]]), gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]))


def test_labels() -> None:
    logits = torch.eye(4)
    assert label_accuracy(logits, torch.tensor([0, 1, 2, 0])) == 0.75
    assert label_agreement(logits, logits[[0, 1, 3, 2]]) == 0.5
