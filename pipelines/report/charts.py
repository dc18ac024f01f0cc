"""Plot the charts of a run's report, as Figures that need no display."""

import io
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Curve = Sequence[tuple[int, float]]
"""Points (trajectory, value)."""

_INK, _MUTED, _LINE, _BEST = "#222222", "#666666", "#0b7a6f", "#b3401f"
_DPI = 120


def _axes(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.2 * panels, 2.9), dpi=_DPI, facecolor="white", layout="constrained")
    found = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in found:
        axes.tick_params(labelsize=7, labelcolor=_MUTED, length=2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.5)
        axes.set_axisbelow(True)
    return figure, found


def _name(axes: Axes, title: str, x: str, y: str = "") -> None:
    axes.set_title(title, loc="left", size=9, weight="bold", color=_INK)
    axes.set_xlabel(x, size=8, color=_INK)
    axes.set_ylabel(y, size=8, color=_INK)


def training_curves(loss: Curve, cur: Curve, target_cur: float = 0.0) -> Figure:
    """Plot the loss and the cache utilisation ratio (CUR) of a training.

    The loss has a logarithmic scale if it is positive.

    Args:
        loss: the training's loss.
        cur: the share of branch outputs that are reused.
        target_cur: shown as a line if it is above 0.
    """
    figure, (left, right) = _axes(2)
    left.plot(*zip(*loss), color=_LINE, linewidth=1.2)
    if min(value for _, value in loss) > 0:
        left.set_yscale("log")
    _name(left, "Loss", "trajectory")
    right.plot(*zip(*cur), color=_LINE, linewidth=1.2)
    if target_cur:
        right.axhline(target_cur, color=_MUTED, linewidth=0.8, linestyle="--")
    right.set_ylim(0, 1)
    _name(right, "CUR", "trajectory")
    return figure


def lambda_curves(curves: Mapping[int, Sequence[float]]) -> Figure:
    """Plot lambda of every step after each refresh, the last one darkest.

    Args:
        curves: lambda of steps 0, 1, ..., by trajectory.
    """
    figure, (axes,) = _axes(1)
    last = max(curves)
    for position, trajectory in enumerate(sorted(curves)):
        share = (position + 1) / len(curves)
        label = f"trajectory {trajectory}" if trajectory in (min(curves), last) else None
        axes.plot(curves[trajectory], color=_LINE, alpha=0.15 + 0.85 * share**2, linewidth=1.2, label=label)
    axes.legend(fontsize=7, frameon=False)
    _name(axes, "Lambda", "step i  (noisiest at the right)", "lambda")
    return figure


def png_of(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
