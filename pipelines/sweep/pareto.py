"""Find the Pareto front: the points that no other dominates in speed and PSNR."""

from collections.abc import Sequence

from matplotlib.figure import Figure

_FRONT, _REST = "#0b7a6f", "#b9bcc0"


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each point whether it lies on the Pareto front.

    It does if no other point is at least as good in both coordinates and better in one.

    Args:
        points: higher is better, in both.
    """
    return [not any(x >= ours[0] and y >= ours[1] and (x, y) != ours for x, y in points) for ours in points]


def front_figure(points: Sequence[tuple[float, float]], names: Sequence[str]) -> Figure:
    """Plot PSNR to full against measured speedup; the front is joined and labelled.

    Args:
        points: (speedup, PSNR in dB).
        names: one label for each point.
    """
    figure = Figure(figsize=(6.4, 4.2), dpi=120, facecolor="white", layout="constrained")
    axes = figure.subplots()
    front = on_front(points)
    rest = [point for point, best in zip(points, front) if not best]
    if rest:
        axes.plot(*zip(*rest), color=_REST, marker="o", linestyle="", label="trials")
    best = sorted((point, name) for point, name, is_best in zip(points, names, front) if is_best)
    axes.plot(*zip(*(point for point, _ in best)), color=_FRONT, marker="o", linewidth=1.2, label="front")
    for point, name in best:
        axes.annotate(name, point, xytext=(5, 5), textcoords="offset points", size=7, color="#444444")
    axes.margins(0.12)
    axes.grid(color="#e6e6e6", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("measured speedup", size=9)
    axes.set_ylabel("PSNR to full, dB", size=9)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)
    return figure
