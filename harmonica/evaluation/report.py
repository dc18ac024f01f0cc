"""Compute a variant's metrics, each with its 95% interval, from its accumulator.

The interval of `psnr_to_full` is `psnr_to_full_interval`, [low, high] (`harmonica.evaluation.bootstrap`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harmonica.evaluation.accumulators import LOGITS, POOLED, SPATIAL, MetricAccumulator
from harmonica.evaluation.bootstrap import interval, resample_weights, weighted_means
from harmonica.evaluation.distribution_metrics import (
    class_information,
    frechet_resampled,
    in_manifold,
    inception_score,
    kernel_distances,
)
from harmonica.evaluation.feature_statistics import FeatureStatistics
from harmonica.evaluation.image_metrics import frechet_distance
from harmonica.evaluation.metric_table import KID_TO_FULL, TO_FULL, interval_key
from harmonica.evaluation.reference_sets import ReferenceSet

_LARGE, _LARGE_RESAMPLES = 512, 20
"""Above 512 features, where one resample of a Frechet distance takes seconds, only 20 are used."""
_KINDS = {"frechet": POOLED, "spatial_frechet": SPATIAL}


@dataclass(frozen=True, slots=True, eq=False)
class Resamples:
    """Holds the bootstrap weights that all variants of a report share.

    So an image and its counterpart in another variant are resampled together.
    """

    all_RN: Tensor
    """Weights for metrics of every image."""
    kept_RN: Tensor
    """Weights for features, which only the first images have."""
    reference_seed: int = 0

    @classmethod
    def of(cls, variant: MetricAccumulator, resamples: int, seed: int) -> "Resamples":
        """Draw the weights; 0 resamples give none."""
        whole = resample_weights(variant.num_rows, resamples, seed)
        same = variant.num_kept == variant.num_rows
        return cls(whole, whole if same else resample_weights(variant.num_kept, resamples, seed), seed)

    def __len__(self) -> int:
        return len(self.all_RN)


class _Report:
    """Collects the metrics of one variant and their intervals."""

    def __init__(self, resamples: Resamples) -> None:
        self.resamples, self.numbers = resamples, dict[str, Any]()

    def put(self, name: str, value: float, resampled_R: Tensor | None, **limits: Any) -> None:
        self.numbers[name] = value
        if resampled_R is not None and len(resampled_R) > 1:
            self.numbers[interval_key(name)] = interval(value, resampled_R, **limits)

    def put_mean(self, name: str, values_N: Tensor, weights_RN: Tensor, **limits: Any) -> None:
        resampled = weighted_means(values_N, weights_RN) if len(weights_RN) else None
        self.put(name, values_N.double().mean().item(), resampled, **limits)


def variant_metrics(
    ours: MetricAccumulator,
    full: MetricAccumulator | None,
    real: ReferenceSet | None,
    resamples: Resamples,
    real_name: str = "test",
) -> dict[str, Any]:
    """Return the metrics of a variant's images, as JSON values.

    Those against the images of its reference are among them.

    Args:
        full: the reference that it is compared with; None if the variant is the reference.
        real: statistics of real images; None leaves out the metrics that need them.
        real_name: suffix of their metrics, as in `frechet_to_test`.
    """
    report, every = _Report(resamples), resamples.all_RN
    if full is not None:
        for name in ("psnr", "ssim", "lpips"):
            if name in ours.numbers:
                report.put_mean(f"{name}{TO_FULL}", ours.numbers[name], every)
    if "clip_score" in ours.numbers:
        report.put_mean("clip_score", ours.numbers["clip_score"], every, low=0, high=100)
    if "class" in ours.numbers:
        _put_labels(report, ours, full)
    if POOLED in ours.kept:
        if real is not None:
            _put_distances_to_real(report, ours, real, real_name)
        _put_inception_score(report, ours)
        if full is not None:
            report.numbers |= distances_to_full(ours, full, resamples)
    return report.numbers


def _put_labels(report: _Report, ours: MetricAccumulator, full: MetricAccumulator | None) -> None:
    asked, seen, every = ours.numbers["label"], ours.numbers["class"], report.resamples.all_RN
    known = asked >= 0
    if known.any():
        right = (asked == seen).double()
        weights = every * known
        resampled = weighted_means(right, weights) if len(weights) else None
        report.put("label_accuracy", right[known].mean().item(), resampled, low=0, high=1)
    if full is not None:
        same = seen == full.numbers["class"]
        report.put_mean("label_agreement", same.double(), every, low=0, high=1)


def _frechet(
    report: _Report,
    name: str,
    kind: str,
    ours: MetricAccumulator,
    other: MetricAccumulator | FeatureStatistics,
) -> None:
    features = ours.kept[kind]
    weights = report.resamples.kept_RN
    if features.shape[1] > _LARGE:
        weights = weights[:_LARGE_RESAMPLES]
    if isinstance(other, MetricAccumulator):
        value = frechet_distance(ours.sums[kind].statistics(), other.sums[kind].statistics())
        resampled = frechet_resampled(features, other.kept[kind], weights)
    else:
        value = frechet_distance(ours.sums[kind].statistics(), other)
        resampled = frechet_resampled(features, other, weights)
    report.put(name, value, resampled, **_counts(ours), low=0)


def _counts(variant: MetricAccumulator) -> dict[str, int]:
    return {"count": variant.num_rows, "resampled_count": variant.num_kept}


def _kid(report: _Report, name: str, ours: MetricAccumulator, other: Tensor, *, same_rows: bool) -> None:
    features, weights = ours.kept[POOLED], report.resamples.kept_RN
    once = torch.ones(1, len(features), dtype=torch.float64)
    values = kernel_distances(features, other, torch.cat([once, weights]), same_rows=same_rows)
    # Only kept images have features, so the number itself is of those too.
    report.put(name, values[0].item(), values[1:])


def distances_to_full(
    ours: MetricAccumulator, full: MetricAccumulator, resamples: Resamples
) -> dict[str, Any]:
    """Return distances between two variants' images as sets.

    Between full sampling and full sampling from another seed they are the noise floor.
    """
    report = _Report(resamples)
    for name, kind in _KINDS.items():
        _frechet(report, f"{name}{TO_FULL}", kind, ours, full)
    _kid(report, KID_TO_FULL, ours, full.kept[POOLED], same_rows=True)
    return report.numbers


def _put_distances_to_real(
    report: _Report, ours: MetricAccumulator, real: ReferenceSet, real_name: str
) -> None:
    for (name, kind), statistics in zip(_KINDS.items(), (real.pooled, real.spatial)):
        if statistics is not None:
            _frechet(report, f"{name}_to_{real_name}", kind, ours, statistics)
    if real.features_MF is None:
        return
    _kid(report, f"kid_to_{real_name}", ours, real.features_MF, same_rows=False)
    # Both sets have equally many images, since recall grows with those that span the manifold.
    count = min(ours.num_kept, len(real.features_MF))
    drawn, existing = ours.kept[POOLED][:count], real.features_MF[:count]
    weights = resample_weights(count, len(report.resamples), report.resamples.reference_seed)
    for name, points, manifold in (("precision", drawn, existing), ("recall", existing, drawn)):
        report.put_mean(name, in_manifold(points, manifold).double(), weights, low=0, high=1)


def _put_inception_score(report: _Report, ours: MetricAccumulator) -> None:
    p, p_log_p = class_information(ours.kept[LOGITS])
    weights = report.resamples.kept_RN
    resampled = None
    if len(weights):
        mean_p = weights @ p / weights.sum(1, keepdim=True)
        resampled = inception_score(mean_p, weighted_means(p_log_p, weights))
    report.put("inception_score", ours.inception_score(), resampled, **_counts(ours), low=1)
