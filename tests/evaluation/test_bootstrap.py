"""Intervals against what the central limit theorem says, and as properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick

from harmonica.evaluation.bootstrap import interval, resample_weights, weighted_means


def test_weights_are_images_drawn_with_replacement_and_always_the_same() -> None:
    weights = resample_weights(50, 30, seed=3)
    assert weights.shape == (30, 50)
    assert torch.equal(weights.sum(1), torch.full((30,), 50.0, dtype=torch.float64))
    assert torch.equal(weights, resample_weights(50, 30, seed=3))
    assert not torch.equal(weights, resample_weights(50, 30, seed=4))
    assert (weights == 0).double().mean().item() == pytest.approx(math.exp(-1), abs=0.03)


def test_a_mean_s_interval_is_that_of_the_normal_distribution() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    resampled = weighted_means(values, resample_weights(400, 4000))
    low, high = interval(values.mean().item(), resampled)
    half = 1.96 * values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - half, abs=0.06 * half)
    assert high == pytest.approx(values.mean().item() + half, abs=0.06 * half)


def test_fewer_resampled_images_than_counted_ones_narrow_it_by_the_root() -> None:
    resampled = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = interval(5.0, resampled)
    narrow_low, narrow_high = interval(5.0, resampled, count=400, resampled_count=100)
    assert narrow_high - narrow_low == pytest.approx((high - low) / 2)


@quick
@given(
    st.lists(st.floats(-100, 100), min_size=2, max_size=30),
    st.floats(0, 1),
)
def test_an_interval_keeps_its_limits_and_a_bias_does_not_move_it(
    resampled: list[float], value: float
) -> None:
    values = torch.tensor(resampled, dtype=torch.float64)
    low, high = interval(value, values, low=0, high=1)
    assert 0 <= low <= value + 1e-9 and value - 1e-9 <= high <= 1
    moved = interval(value, values + 7, low=0, high=1)
    assert moved == pytest.approx([low, high], abs=1e-9)
