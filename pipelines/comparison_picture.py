"""The picture of a comparison: quality against measured speed, a line for each method."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from pipelines.contenders import OURS

_MARKS = "osD^vP*Xd<>h"


def comparison_picture(points: Sequence[dict[str, Any]]) -> Figure:
    """PSNR to the full images over measured speed; bars are 95% intervals over images."""
    figure = Figure(figsize=(9, 5.5), dpi=150, facecolor="white", layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(point["method"] for point in points))
    for place, method in enumerate(methods):
        of_method = sorted((p for p in points if p["method"] == method), key=lambda p: p["speedup"])
        x = [p["speedup"] for p in of_method]
        y = [p["psnr_to_full"] for p in of_method]
        ends = [p.get("psnr_to_full_interval", (v, v)) for p, v in zip(of_method, y)]
        bars = [[v - low for v, (low, _) in zip(y, ends)], [high - v for v, (_, high) in zip(y, ends)]]
        is_ours = method == OURS
        axes.errorbar(
            x,
            y,
            yerr=bars,
            label=method,
            marker=_MARKS[place % len(_MARKS)],
            color="#c0392b" if is_ours else None,
            linewidth=2.2 if is_ours else 1.0,
            markersize=8 if is_ours else 5,
            zorder=3 if is_ours else 2,
            capsize=2,
        )
    axes.set_xlabel("measured speed, full sampling = 1")
    axes.set_ylabel("PSNR to the full sampler's images, dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False, ncols=2)
    return figure
