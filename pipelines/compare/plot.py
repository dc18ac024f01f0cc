"""Plot a comparison: quality against measured speed, one line for each method."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from harmonica.evaluation.metric_table import PSNR_TO_FULL, SPEEDUP, interval_key

from .names import OURS, label

_MARKS = "osD^vP*Xd<>h"
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")

Place = tuple[float, float]


def comparison_picture(
    points: Sequence[Mapping[str, Any]], missing: Sequence[Mapping[str, Any]] = ()
) -> Figure:
    """Plot PSNR to the full images over measured speed, with 95% intervals.

    The intervals are over images. Every seed has its mark; the line goes through the means of a method's
    seeds at each speed.

    Every seed has its mark; the line goes through the means of a method's seeds at each speed.

    Args:
        missing: variants that were not measured; the legend says how many.
    """
    figure = Figure(figsize=(9, 5.5), dpi=150, facecolor="white", layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys((point["method"], label(point)) for point in points))
    for place, (method, name) in enumerate(methods):
        of_method = [point for point in points if (point["method"], label(point)) == (method, name)]
        is_ours = method == OURS
        colour = "#c0392b" if is_ours else _COLOURS[place % len(_COLOURS)]
        order = 3 if is_ours else 2
        mark = _MARKS[place % len(_MARKS)]
        axes.plot(*zip(*line(of_method)), color=colour, linewidth=2.2 if is_ours else 1.0, zorder=order)
        axes.errorbar(
            [point[SPEEDUP] for point in of_method],
            [point[PSNR_TO_FULL] for point in of_method],
            yerr=list(zip(*map(_bar, of_method))),
            label=name,
            marker=mark,
            markersize=7 if is_ours else 5,
            linestyle="",
            capsize=2,
            color=colour,
            zorder=order,
        )
    for name, count in Counter(map(label, missing)).items():
        axes.plot([], [], " ", label=f"{name}: {count} not measured")
    axes.set_xlabel("measured speed, full sampling = 1")
    axes.set_ylabel("PSNR to the full sampler's images, dB")
    axes.grid(alpha=0.3)
    if methods or missing:
        axes.legend(fontsize=7, frameon=False, ncols=2)
    return figure


def line(points: Sequence[Mapping[str, Any]]) -> list[Place]:
    """Return the corners of one method's line, from slow to fast.

    Points that were made for the same speed are one corner, their mean.
    """
    groups: dict[Any, list[Place]] = {}
    for number, point in enumerate(points):
        # A library's setting has no speed that it was made for, and stands alone.
        made_for = point.get("target_speedup", f"point {number}")
        groups.setdefault(made_for, []).append((point[SPEEDUP], point[PSNR_TO_FULL]))
    means = [
        (sum(x for x, _ in some) / len(some), sum(y for _, y in some) / len(some)) for some in groups.values()
    ]
    return sorted(means)


def _bar(point: Mapping[str, Any]) -> Place:
    """Return how far the interval reaches below and above the value."""
    value = point[PSNR_TO_FULL]
    low, high = point.get(interval_key(PSNR_TO_FULL), (value, value))
    return value - low, high - value
