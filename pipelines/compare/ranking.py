"""Find the method nearest to the full images at each speed, and say it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from harmonica.evaluation.metric_table import PSNR_TO_FULL, SPEEDUP

from .names import OURS, OURS_LABEL, label_of, shown_name

_NEAR = 0.97
"""Fraction of a target speed at which a variant counts as meeting it."""
_OTHER_PSNR = f"rival_{PSNR_TO_FULL}"  # the key in `comparison.json`, which stays
Points = Sequence[Mapping[str, Any]]


def leaders(points: Points, targets: Sequence[float]) -> list[dict[str, Any]]:
    """Compare our PSNR to full with the best other method's, at each speed.

    The other methods are those made for that speed, and caches of libraries whose measured speed is at least
    near it. If ours was not measured, `is_first` is None.
    """
    return [_at(target, points) for target in targets]


def _at(target: float, points: Points) -> dict[str, Any]:
    ours = [p[PSNR_TO_FULL] for p in points if p["method"] == OURS and p["target_speedup"] == target]
    baselines: dict[str, list[float]] = {}
    for point in points:
        if _is_as_fast(point, target) and point["method"] != OURS:
            name = f"{label_of(point['method'])}" + (f" {point['setting']:g}" if "setting" in point else "")
            baselines.setdefault(name, []).append(point[PSNR_TO_FULL])
    best = max(baselines, key=lambda name: _mean(baselines[name]), default="")
    nearest = _mean(baselines[best]) if best else -math.inf
    return {
        "target_speedup": target,
        PSNR_TO_FULL: _mean(ours) if ours else None,
        "rival": best,
        _OTHER_PSNR: nearest if best else None,
        "is_first": _mean(ours) > nearest if ours else None,
    }


def _is_as_fast(point: Mapping[str, Any], target: float) -> bool:
    if "target_speedup" in point:
        return bool(point["target_speedup"] == target)
    return bool(point[SPEEDUP] >= _NEAR * target)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def ranking_summary(speeds: Sequence[Mapping[str, Any]], points: Points = (), missing: Points = ()) -> str:
    """Summarise the comparison for the report and the last line of output.

    Args:
        speeds: the result of `leaders`.
        points: the measured points, from which our method takes its label.
        missing: the variants that were not measured, each with its `reason`.
    """
    known = [speed for speed in speeds if speed["is_first"] is not None]
    first = sum(speed["is_first"] for speed in known)
    labels = sorted({shown_name(point) for point in points if point["method"] == OURS}) or [OURS_LABEL]
    name = " or ".join(labels)
    message = f"{name[:1].upper()}{name[1:]} is first at {first} of {len(known)} speeds"
    lost = [
        f"{speed['target_speedup']:g}x ({speed['rival']}: {speed[_OTHER_PSNR]:.1f} dB, ours "
        f"{speed[PSNR_TO_FULL]:.1f})"
        for speed in known
        if not speed["is_first"]
    ]
    message += (f", not at {', '.join(lost)}" if lost else "") + "."
    if unknown := [f"{speed['target_speedup']:g}x" for speed in speeds if speed["is_first"] is None]:
        message += f" It was not measured at {', '.join(unknown)}."
    return message + (f" {summary_of(missing)}" if missing else "")


def summary_of(missing: Points) -> str:
    """Return how many variants were not measured, and for each reason which ones."""
    reasons: dict[str, list[str]] = {}
    for one in missing:
        reasons.setdefault(one["reason"], []).append(missing_name(one))
    each = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    count = f"{len(missing)} variant{'s were' if len(missing) > 1 else ' was'}"
    return f"{count} not measured: {each}."


def missing_name(one: Mapping[str, Any]) -> str:
    """Return the method, speed and seed of a variant that was not measured."""
    message = [shown_name(one)]
    if "target_speedup" in one:
        message.append(f"at {one['target_speedup']:g}x")
    if one.get("seed"):
        message.append(f"seed {one['seed']}")
    return " ".join(message)
