"""Define the metrics of reports.

Each has a key in JSON, a shown name, a format, a unit and a better direction.

The keys are stored in reports, comparisons, MLflow and the registry, and stay. A number that is not in the
table is shown too, under its key in words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

NUM_INFERENCE_STEPS: Final = "num_inference_steps"
SECONDS_PER_IMAGE: Final = "seconds_per_image"
SECONDS_SPREAD: Final = "seconds_spread"
SPEEDUP: Final = "speedup"
CUR: Final = "cur"
IDEAL_SPEEDUP: Final = "ideal_speedup"
MEASURED_SPEEDUP: Final = "measured_speedup"
REALISED_SHARE: Final = "realised_share"
TO_FULL: Final = "_to_full"
"""Suffix of the metrics that compare with the full sampler's images."""
PSNR_TO_FULL: Final = "psnr_to_full"
SSIM_TO_FULL: Final = "ssim_to_full"
LPIPS_TO_FULL: Final = "lpips_to_full"
FRECHET_TO_FULL: Final = "frechet_to_full"
SPATIAL_FRECHET_TO_FULL: Final = "spatial_frechet_to_full"
KID_TO_FULL: Final = "kid_to_full"
FRECHET_TO_TEST: Final = "frechet_to_test"
FRECHET_TO_REFERENCE: Final = "frechet_to_reference"
SPATIAL_FRECHET_TO_REFERENCE: Final = "spatial_frechet_to_reference"
CLIP_SCORE: Final = "clip_score"
INCEPTION_SCORE: Final = "inception_score"
PRECISION: Final = "precision"
RECALL: Final = "recall"
LABEL_ACCURACY: Final = "label_accuracy"
LABEL_AGREEMENT: Final = "label_agreement"


@dataclass(frozen=True, slots=True)
class Metric:
    """Describes a number of a report and its presentation."""

    key: str
    """Its key in JSON."""
    name: str
    """Its name in tables."""
    form: str = "{:.4g}"
    """Format of a number, without its unit."""
    unit: str = ""
    higher_is_better: bool | None = None
    """None if neither direction is better by itself."""
    column: str = ""
    """Format in a column of the terminal, with fixed places, so that numbers align; `form` if ""."""

    @property
    def heading(self) -> str:
        """Return the name with the unit, for a column whose cells have none."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    @property
    def column_form(self) -> str:
        """Return the format of a number in a column of the terminal."""
        return self.column or self.form

    def shown(self, value: float) -> str:
        """Return a value with its unit."""
        return self.form.format(value) + (f" {self.unit}" if self.unit else "")

    def is_better(self, value: float, other: float) -> bool:
        """Return whether a value is better than another; NaN is better than nothing.

        Raises:
            ValueError: neither direction is better.
        """
        if self.higher_is_better is None:
            raise ValueError(f"{self.key} has no better direction: compare another metric")
        return value > other if self.higher_is_better else value < other


_TABLE = (
    Metric(NUM_INFERENCE_STEPS, "steps", "{:.0f}"),
    Metric(SECONDS_PER_IMAGE, "s / image", "{:.4f}", higher_is_better=False),
    Metric(SECONDS_SPREAD, "spread of times", "{:.1%}", higher_is_better=False),
    Metric(SPEEDUP, "speedup", "{:.2f}x", higher_is_better=True),
    Metric(CUR, "CUR", "{:.1%}"),
    Metric(IDEAL_SPEEDUP, "ideal speedup", "{:.2f}x", higher_is_better=True),
    Metric(MEASURED_SPEEDUP, "measured speedup", "{:.2f}x", higher_is_better=True),
    Metric(REALISED_SHARE, "realised share", "{:.2f}", higher_is_better=True),
    Metric(PSNR_TO_FULL, "PSNR to full", "{:.2f}", "dB", higher_is_better=True),
    Metric(SSIM_TO_FULL, "SSIM to full", higher_is_better=True),
    Metric(LPIPS_TO_FULL, "LPIPS to full", higher_is_better=False),
    Metric(FRECHET_TO_FULL, "Frechet to full", higher_is_better=False, column="{:.4f}"),
    Metric(SPATIAL_FRECHET_TO_FULL, "spatial Frechet to full", higher_is_better=False),
    Metric(KID_TO_FULL, "KID to full", higher_is_better=False),
    Metric(FRECHET_TO_TEST, "Frechet to test", higher_is_better=False, column="{:.2f}"),
    Metric(FRECHET_TO_REFERENCE, "FID", higher_is_better=False, column="{:.2f}"),
    Metric(SPATIAL_FRECHET_TO_REFERENCE, "sFID", higher_is_better=False, column="{:.2f}"),
    Metric(CLIP_SCORE, "CLIP score", higher_is_better=True, column="{:.2f}"),
    Metric(INCEPTION_SCORE, "inception score", higher_is_better=True),
    Metric(PRECISION, "precision", higher_is_better=True),
    Metric(RECALL, "recall", higher_is_better=True),
    Metric(LABEL_ACCURACY, "label accuracy", "{:.1%}", higher_is_better=True),
    Metric(LABEL_AGREEMENT, "same label", "{:.1%}", higher_is_better=True),
)
METRICS: Mapping[str, Metric] = MappingProxyType({metric.key: metric for metric in _TABLE})
"""The known metrics by key."""


def interval_key(key: str) -> str:
    """Return the key of a metric's 95% interval, [low, high]."""
    return f"{key}_interval"


def metric_of(key: str) -> Metric:
    """Return a key's metric; an unknown key is named by its own words."""
    return METRICS.get(key) or Metric(key, key.replace("_", " "))
