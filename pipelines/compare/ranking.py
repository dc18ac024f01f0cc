"""Who is ahead at each speed, in numbers and in words."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.compare.names import OURS, OURS_LABEL, label_of, shown_name

_NEAR = 0.97
"""Of a target: an arm so fast counts as meeting it."""
Points = Sequence[Mapping[str, Any]]


def ahead(points: Points, targets: Sequence[float]) -> list[dict[str, Any]]:
    """At each speed: how near this project's images are, the nearest other method, and which is ahead.

    Another method is any arm as fast: one made for the speed, or a library's whose measured speed is near it.
    Where this project's own is not measured, nothing is said to be first.
    """
    return [_at(target, points) for target in targets]


def _at(target: float, points: Points) -> dict[str, Any]:
    ours = [p["psnr_to_full"] for p in points if p["method"] == OURS and p["target_speedup"] == target]
    rivals: dict[str, list[float]] = {}
    for point in points:
        if _is_as_fast(point, target) and point["method"] != OURS:
            name = f"{label_of(point['method'])}" + (f" {point['setting']:g}" if "setting" in point else "")
            rivals.setdefault(name, []).append(point["psnr_to_full"])
    best = max(rivals, key=lambda name: _mean(rivals[name]), default="")
    nearest = _mean(rivals[best]) if best else -math.inf
    return {
        "target_speedup": target,
        "psnr_to_full": _mean(ours) if ours else None,
        "rival": best,
        "rival_psnr_to_full": nearest if best else None,
        "is_first": _mean(ours) > nearest if ours else None,
    }


def _is_as_fast(point: Mapping[str, Any], target: float) -> bool:
    if "target_speedup" in point:
        return bool(point["target_speedup"] == target)
    return bool(point["speedup"] >= _NEAR * target)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def verdict(speeds: Sequence[Mapping[str, Any]], points: Points = (), missing: Points = ()) -> str:
    """In words, for the report and the last line.

    Args:
        speeds: as `ahead` gives them.
        points: what was measured; those of this project say what it is.
        missing: what was not measured, with `reason`.
    """
    known = [said for said in speeds if said["is_first"] is not None]
    first = sum(said["is_first"] for said in known)
    labels = sorted({shown_name(point) for point in points if point["method"] == OURS}) or [OURS_LABEL]
    name = " or ".join(labels)
    words = f"{name[:1].upper()}{name[1:]} is first at {first} of {len(known)} speeds"
    lost = [
        f"{said['target_speedup']:g}x ({said['rival']}: {said['rival_psnr_to_full']:.1f} dB, ours "
        f"{said['psnr_to_full']:.1f})"
        for said in known
        if not said["is_first"]
    ]
    words += (f", not at {', '.join(lost)}" if lost else "") + "."
    if unknown := [f"{said['target_speedup']:g}x" for said in speeds if said["is_first"] is None]:
        words += f" It was not measured at {', '.join(unknown)}."
    return words + (f" {summary_of(missing)}" if missing else "")


def summary_of(missing: Points) -> str:
    """How many arms were not measured, and why: each reason with those that it concerns."""
    reasons: dict[str, list[str]] = {}
    for one in missing:
        reasons.setdefault(one["reason"], []).append(missing_name(one))
    each = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    count = f"{len(missing)} arm{'s were' if len(missing) > 1 else ' was'}"
    return f"{count} not measured: {each}."


def missing_name(one: Mapping[str, Any]) -> str:
    """Of an arm that was not measured: its method, its speed and its seed."""
    words = [shown_name(one)]
    if "target_speedup" in one:
        words.append(f"at {one['target_speedup']:g}x")
    if one.get("seed"):
        words.append(f"seed {one['seed']}")
    return " ".join(words)
