"""Define the report of an evaluation: speed and metrics of variants, and JSON.

In JSON the variants are under the key `arms`, and a metric's 95% interval is a list [low, high] beside its
number: `psnr_to_full_interval` beside `psnr_to_full`. `harmonica.evaluation.bootstrap` has how it is made.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from harmonica.evaluation.metric_table import (
    CUR,
    FRECHET_TO_FULL,
    IDEAL_SPEEDUP,
    MEASURED_SPEEDUP,
    PSNR_TO_FULL,
    REALISED_SHARE,
    interval_key,
)

FULL: Final = "full"
"""Name of the variant that computes everything."""
CACHED: Final = "cached"
"""Name of the variant that samples by the router."""
FEWER: Final = "fewer_steps"
"""Name of the variant that takes as long as the cached one by fewer steps."""
_METHOD, _VARIANTS = "method", "arms"


def family_variant(name: str) -> str:
    """Return the name that a family's member has in reports."""
    return f"{CACHED} {name}"


@dataclass(frozen=True, slots=True)
class Estimate:
    """Holds a number, and its 95% interval if one was computed."""

    value: float
    interval: tuple[float, float] | None = None


def estimates_from_json(flat: Mapping[str, Any]) -> dict[str, Estimate]:
    """Return the numbers of a flat JSON object in order, with their intervals.

    Other values are left out.
    """
    found: dict[str, Estimate] = {}
    for key, value in flat.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            ends = flat.get(interval_key(key))
            found[key] = Estimate(value, (ends[0], ends[1]) if ends else None)
    return found


def estimates_to_json(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """Return numbers as a flat JSON object, each followed by its interval, if any."""
    flat: dict[str, Any] = {}
    for key, estimate in estimates.items():
        flat[key] = estimate.value
        if estimate.interval is not None:
            flat[interval_key(key)] = list(estimate.interval)
    return flat


@dataclass(frozen=True, slots=True)
class RouterSpeeds:
    """Holds a router's share of reuse and its speedups in MACs and measured time."""

    cur: float
    """Share of the entries of its plan that are reused (Cache Usage Ratio, from 0 to 1)."""
    ideal_speedup: float
    measured_speedup: float
    realised_share: float | None = None
    """Share of the ideal saving that was measured; None if nothing can be saved."""
    method: str = ""
    """How the plan was made; older reports do not say, which is ""."""

    @classmethod
    def of(cls, method: str, cur: float, ideal: float, measured: float) -> "RouterSpeeds":
        """Return the speeds with the realised share that follows from them."""
        share = (1 - 1 / measured) / (1 - 1 / ideal) if ideal > 1 else None
        return cls(cur, ideal, measured, share, method)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "RouterSpeeds | None":
        """Return the speeds among an object's keys, None if it has none."""
        if CUR not in found and MEASURED_SPEEDUP not in found:
            return None
        if missing := [key for key in (CUR, IDEAL_SPEEDUP, MEASURED_SPEEDUP) if key not in found]:
            raise ValueError(f"the evaluation's report has no {missing[0]!r}: evaluate the router again")
        return cls(**{key: found[key] for key in _SPEED_KEYS if key in found})

    def to_json(self) -> dict[str, Any]:
        """Return the speeds by key; the realised share is there also if it is None."""
        found = {key: getattr(self, key) for key in _SPEED_KEYS}
        return found if self.method else {key: value for key, value in found.items() if key != _METHOD}


_SPEED_KEYS: Final = (_METHOD, CUR, IDEAL_SPEEDUP, MEASURED_SPEEDUP, REALISED_SHARE)


@dataclass(frozen=True, slots=True)
class VariantResult:
    """Holds times and metrics of a variant; those not measured are None or missing."""

    num_inference_steps: int | None = None
    seconds_per_image: float | None = None
    """Median of the rounds."""
    seconds_spread: float | None = None
    """(slowest - fastest) / median of the rounds."""
    speedup: float | None = None
    """Measured against full sampling."""
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    """Metrics by the keys of `harmonica.evaluation.metric_table`, in the order of tables."""
    router: RouterSpeeds | None = None
    """Speeds of a family's member, whose router is not the report's own."""

    @property
    def psnr_to_full(self) -> float:
        """Return the mean PSNR to the full sampler's images in dB.

        Raises:
            ValueError: the report lacks it.
        """
        if PSNR_TO_FULL not in self.metrics:
            raise ValueError(f"the evaluation's report has no {PSNR_TO_FULL!r}: evaluate the router again")
        return self.metrics[PSNR_TO_FULL].value

    @property
    def frechet_to_full(self) -> float | None:
        """Return the Fréchet distance to the full sampler's images, None if unmeasured."""
        found = self.metrics.get(FRECHET_TO_FULL)
        return found.value if found else None

    @property
    def numbers(self) -> dict[str, Estimate]:
        """Return the times, the metrics and the router's speeds by key."""
        return estimates_from_json(self.to_json())

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "VariantResult":
        """Read a variant; numbers under unknown keys are metrics too.

        Raises:
            ValueError: a router's speeds are there in part.
        """
        router = RouterSpeeds.from_json(found)
        others = (*_TIME_KEYS, *(_SPEED_KEYS if router else ()))
        metrics = {key: one for key, one in estimates_from_json(found).items() if key not in others}
        return cls(**{key: found.get(key) for key in _TIME_KEYS}, metrics=metrics, router=router)

    def to_json(self) -> dict[str, Any]:
        """Return the variant as it is stored."""
        times = {key: value for key in _TIME_KEYS if (value := getattr(self, key)) is not None}
        return times | estimates_to_json(self.metrics) | (self.router.to_json() if self.router else {})


_TIME_KEYS: Final = tuple(one.name for one in fields(VariantResult) if one.name not in ("metrics", "router"))


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Holds the results of an evaluation, by variant."""

    variants: Mapping[str, VariantResult]
    speeds: RouterSpeeds
    samples: int
    """Number of images of each variant."""
    reuse: str | None = None
    noise_floor: VariantResult | None = None
    """The distances of full sampling to itself from another seed; None without a feature extractor."""
    transfer: Mapping[str, VariantResult] = field(default_factory=dict)
    """Full and cached under samplers for which the plan was not made, by name; of metrics alone."""
    worth_having: bool | None = None
    """Whether the router beats fewer steps at equal time; None in the report of a family's member."""
    verdict: str | None = None
    run_id: str | None = None
    """Identity of the workflow's run, in the stored report."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Values that a report of another version has under keys that are unknown here."""

    @property
    def full(self) -> VariantResult:
        """Return the result of full sampling."""
        return self.variants[FULL]

    @property
    def cached(self) -> VariantResult:
        """Return the result of sampling by the router."""
        return self.variants[CACHED]

    def of_member(self, name: str) -> "EvaluationReport":
        """Return the report of a family's member, as if it had been evaluated alone.

        Raises:
            ValueError: the member was not evaluated.
        """
        variant = self.variants.get(family_variant(name))
        if variant is None or variant.router is None:
            raise ValueError(f"the evaluation's report has no member {name!r}: evaluate the run again")
        return EvaluationReport({CACHED: replace(variant, router=None)}, variant.router, self.samples)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "EvaluationReport":
        """Read a report, this version's or an older one's.

        Raises:
            ValueError: a required key is missing.
        """
        speeds = RouterSpeeds.from_json(found)
        if missing := [key for key in (_VARIANTS, "samples") if key not in found]:
            raise ValueError(f"the evaluation's report has no {missing[0]!r}: evaluate the router again")
        if speeds is None:
            raise ValueError(f"the evaluation's report has no {CUR!r}: evaluate the router again")
        floor = found.get("noise_floor")
        plain: dict[str, Any] = {key: found.get(key) for key in _PLAIN_KEYS}
        known = (_VARIANTS, "noise_floor", "transfer", *_PLAIN_KEYS, *_SPEED_KEYS)
        return cls(
            variants=_variants(found[_VARIANTS]),
            speeds=speeds,
            noise_floor=VariantResult.from_json(floor) if floor else None,
            transfer=_variants(found.get("transfer", {})),
            extra={key: value for key, value in found.items() if key not in known},
            **plain,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as it is stored; values that it lacks have no key."""
        plain = {key: value for key in _PLAIN_KEYS if (value := getattr(self, key)) is not None}
        ends = {key: plain.pop(key) for key in ("worth_having", "verdict") if key in plain}
        report = plain | self.speeds.to_json() | {_VARIANTS: _to_json(self.variants)}
        if self.noise_floor is not None:
            report["noise_floor"] = self.noise_floor.to_json()
        if self.transfer:
            report["transfer"] = _to_json(self.transfer)
        return report | ends | dict(self.extra)


_PLAIN_KEYS: Final = ("run_id", "samples", "reuse", "worth_having", "verdict")


def _variants(found: Mapping[str, Mapping[str, Any]]) -> dict[str, VariantResult]:
    return {name: VariantResult.from_json(one) for name, one in found.items()}


def _to_json(variants: Mapping[str, VariantResult]) -> dict[str, Any]:
    return {name: one.to_json() for name, one in variants.items()}
