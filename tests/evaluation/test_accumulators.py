"""Streaming: what order and batches of the rows change, which is nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from tolerances import close, rounding
from torch_fidelity.metric_isc import isc_features_to_metric

from harmonica.evaluation import accumulators
from harmonica.evaluation.accumulators import LOGITS, POOLED, FeatureSums, MetricAccumulator
from harmonica.evaluation.feature_statistics import FeatureStatistics

ROWS = 37


def columns(rows: int = ROWS) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "psnr": generator.normal(30, 2, rows),
        POOLED: generator.normal(size=(rows, 6)).astype(np.float32) + 3,
        LOGITS: generator.normal(size=(rows, 4)).astype(np.float32),
    }


def streamed(order: np.ndarray, batch_size: int, kept_rows: int, rows: int = ROWS) -> MetricAccumulator:
    variant, data = MetricAccumulator(rows, kept_rows), columns(rows)
    for start in range(0, rows, batch_size):
        index = order[start : start + batch_size]
        variant.add(index, {name: column[index] for name, column in data.items()})
    return variant


@quick
@given(st.permutations(range(ROWS)), st.integers(1, ROWS), st.integers(2, 50))
def test_order_and_batches_change_no_bit_of_images_and_the_rounding_of_sums(order, size, kept_rows) -> None:
    plain, other = streamed(np.arange(ROWS), ROWS, kept_rows), streamed(np.array(order), size, kept_rows)
    for name in ("psnr", POOLED, LOGITS):
        table = plain.numbers if name == "psnr" else plain.kept
        same = other.numbers if name == "psnr" else other.kept
        assert torch.equal(table[name], same[name])
        assert len(table[name]) == (ROWS if name == "psnr" else min(ROWS, kept_rows))
    first, second = plain.sums[POOLED].statistics(), other.sums[POOLED].statistics()
    near = close(torch.float64, 2 * ROWS, amplification=10)  # the squares of means of 3 are taken away
    torch.testing.assert_close(first.covariance, second.covariance, **near)
    near_score = rounding(torch.float64, 8 * ROWS)
    assert plain.inception_score() == pytest.approx(other.inception_score(), rel=near_score)


def test_sums_are_the_statistics_of_all_images_not_of_those_kept() -> None:
    statistics = streamed(np.arange(ROWS), 5, kept_rows=3).sums[POOLED].statistics()
    expected = FeatureStatistics.from_features(torch.from_numpy(columns()[POOLED]))
    assert statistics.count == ROWS
    torch.testing.assert_close(statistics.mean, expected.mean)
    torch.testing.assert_close(statistics.covariance, expected.covariance)


def test_a_single_image_has_no_covariance() -> None:
    sums = FeatureSums(2)
    sums.add(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="2 or more"):
        sums.statistics()


def test_inception_score_is_the_mean_over_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulators, "_SPLIT", 20)
    logits = torch.from_numpy(columns(60)[LOGITS])
    found = streamed(np.arange(60), 7, kept_rows=5, rows=60).inception_score()
    expected = isc_features_to_metric(logits, splits=3, shuffle=False)["inception_score_mean"]
    assert found == pytest.approx(expected)


def test_a_row_that_never_came_is_seen() -> None:
    variant = MetricAccumulator(4)
    variant.add(np.arange(3), {"psnr": np.ones(3)})
    assert variant.numbers["psnr"].isnan().tolist() == [False, False, False, True]
