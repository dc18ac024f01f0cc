"""A variant's report: which numbers, where, and what they are for variants of known images."""

import numpy as np
import pytest
import torch

from harmonica.evaluation.accumulators import LOGITS, POOLED, SPATIAL, MetricAccumulator
from harmonica.evaluation.feature_statistics import FeatureStatistics
from harmonica.evaluation.image_metrics import frechet_distance
from harmonica.evaluation.reference_sets import ReferenceSet
from harmonica.evaluation.report import Resamples, distances_to_full, variant_metrics

ROWS = 60


def variant(
    seed: int = 0, shift: float = 0.0, kept_rows: int = ROWS, **columns: np.ndarray
) -> MetricAccumulator:
    generator = np.random.default_rng(seed)
    kept = MetricAccumulator(ROWS, kept_rows)
    features = {name: generator.normal(size=(ROWS, 5)) + shift for name in (POOLED, SPATIAL, LOGITS)}
    label = np.arange(ROWS) % 5
    given = {"label": label, "class": label, **features, **columns}
    kept.add(np.arange(ROWS), {name: np.asarray(c, np.float32) for name, c in given.items()})
    return kept


@pytest.fixture
def real() -> ReferenceSet:
    features = torch.randn(80, 5, generator=torch.Generator().manual_seed(9))
    statistics = FeatureStatistics.from_features(features)
    return ReferenceSet(statistics, statistics, features)


def resamples(kept: MetricAccumulator, count: int = 40) -> Resamples:
    return Resamples.of(kept, count, seed=1)


def test_every_number_has_an_interval_around_it(real: ReferenceSet) -> None:
    columns = {name: np.linspace(0.2, 0.9, ROWS) for name in ("psnr", "ssim", "lpips", "clip_score")}
    ours, full = variant(1, 0.1, **columns), variant()
    report = variant_metrics(ours, full, real, resamples(full))
    names = {name for name in report if not name.endswith("_interval")}
    assert names == {
        *(f"{name}_to_full" for name in ("psnr", "ssim", "lpips", "frechet", "spatial_frechet", "kid")),
        *(f"{name}_to_test" for name in ("frechet", "spatial_frechet", "kid")),
        *("precision", "recall", "inception_score", "clip_score", "label_accuracy", "label_agreement"),
    }
    for name in names:
        low, high = report[f"{name}_interval"]
        assert low <= report[name] <= high, name
    assert report["psnr_to_full"] == pytest.approx(0.55)
    expected = frechet_distance(ours.sums[POOLED].statistics(), full.sums[POOLED].statistics())
    assert report["frechet_to_full"] == pytest.approx(expected)
    assert report == variant_metrics(ours, full, real, resamples(full)), "seeded"


def test_the_reference_variant_is_not_held_against_itself_and_no_resamples_give_no_intervals(real) -> None:
    full = variant(psnr=np.ones(ROWS))
    report = variant_metrics(full, None, real, resamples(full, 0), "reference")
    assert not any("interval" in name or "to_full" in name for name in report)
    assert {"frechet_to_reference", "kid_to_reference", "precision", "inception_score"} <= set(report)


def test_equal_variants_are_at_no_distance_and_a_shift_is_its_square() -> None:
    full = variant()
    same = distances_to_full(variant(), full, resamples(full))
    assert same["frechet_to_full"] == pytest.approx(0, abs=1e-6)
    assert same["kid_to_full"] == pytest.approx(0, abs=1e-9)
    assert same["frechet_to_full_interval"] == pytest.approx([0, 0], abs=1e-6)
    moved = distances_to_full(variant(shift=2.0), full, resamples(full))
    assert moved["frechet_to_full"] == pytest.approx(5 * 4.0, rel=1e-5)
    assert moved["kid_to_full"] > 1


def test_labels_that_nobody_knows_are_left_out() -> None:
    label = np.where(np.arange(ROWS) < 20, np.arange(ROWS) % 5, -1)
    seen = np.where(np.arange(ROWS) < 10, label, 7)
    ours = variant(**{"label": label, "class": seen})
    report = variant_metrics(ours, None, None, resamples(ours, 400))
    low, high = report["label_accuracy_interval"]
    assert report["label_accuracy"] == 0.5
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 20) ** 0.5, rel=0.25), "of the 20 that are known"
    unknown = variant(label=np.full(ROWS, -1))
    assert "label_accuracy" not in variant_metrics(unknown, None, None, resamples(unknown))


def test_without_features_there_are_the_numbers_of_single_images() -> None:
    kept = MetricAccumulator(ROWS)
    kept.add(np.arange(ROWS), {"label": np.zeros(ROWS), "psnr": np.full(ROWS, 40.0)})
    report = variant_metrics(kept, kept, None, resamples(kept))
    assert report == {"psnr_to_full": 40.0, "psnr_to_full_interval": [40.0, 40.0]}


def test_fewer_kept_images_give_the_number_of_all_and_an_interval_of_like_width(real: ReferenceSet) -> None:
    whole, part = (variant(1, 0.5, kept) for kept in (ROWS, 30))
    reports = [variant_metrics(one, None, real, resamples(one, 200)) for one in (whole, part)]
    for name in ("frechet_to_test", "inception_score"):
        assert reports[0][name] == pytest.approx(reports[1][name])
        widths = [float(np.diff(report[f"{name}_interval"])[0]) for report in reports]
        assert widths[1] == pytest.approx(widths[0], rel=0.5)
