"""Plot sample sheets and router heat maps, as Figures that need no display.

Shapes: N batch, C channels, H W image, T steps, N branches (of a router's table).
"""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from harmonica.validation.finite import check_finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PictureFormat = Literal["png", "jpeg", "webp"]
_DPI = 150
_NAME_WIDTH = 16  # letters that a column is wide
_TITLE_WIDTH = 18  # letters of a row's title, a line
_INK, _MUTED = "#222222", "#666666"


def to_uint8(images_NCHW: Tensor) -> np.ndarray:
    """Convert images in [-1, 1] to pixels (N, H, W, C); values outside are clipped.

    Raises:
        NotFinite: an image is not finite, of which black pixels would be made.
    """
    check_finite(images_NCHW, "images are")
    pixels = ((images_NCHW.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).byte().cpu().numpy()


def to_pil(image_CHW: Tensor) -> Image.Image:
    """Convert an image in [-1, 1] to a grey (C = 1) or RGB (C = 3) PIL image."""
    pixels = to_uint8(image_CHW[None])[0]
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def encode_picture(image_CHW: Tensor, kind: PictureFormat = "png", quality: int = 100) -> bytes:
    """Encode an image in [-1, 1] as the bytes of an image file.

    Args:
        quality: of jpeg and webp, 0 to 100, the best; png loses nothing.
    """
    buffer = io.BytesIO()
    to_pil(image_CHW).save(buffer, format=kind.upper(), **({} if kind == "png" else {"quality": quality}))
    return buffer.getvalue()


def _figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> "Figure":
    """Create a figure without pyplot, which keeps all its figures in a global list."""
    from matplotlib.figure import Figure  # not at the top: who writes image files alone needs none

    return Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout=layout)


def sample_sheet(
    rows: dict[str, Tensor], column_names: Sequence[str], path: Path | None = None, *, title: str = ""
) -> "Figure":
    """Draw rows of images (columns, C, H, W) with titles of rows and columns.

    Long names, prompts for example, take up to three lines and lose the rest.

    Raises:
        ValueError: a row does not hold one image a column.
    """
    if not rows or not column_names:
        raise ValueError("a sample sheet needs at least one row and one column")
    for name, images in rows.items():
        if images.ndim != 4 or len(images) != len(column_names):
            raise ValueError(
                f"row {name!r} has shape {tuple(images.shape)} for {len(column_names)} column names"
            )
    cell, gap = 0.9, 0.06  # inches
    left = 0.25 + 0.085 * max(len(line) for name in rows for line in name.split("\n"))
    names = [textwrap.wrap(name, _NAME_WIDTH, max_lines=3, placeholder=" ...") for name in column_names]
    lines = max(1, *map(len, names))
    top, edge = (0.68 if title else 0.4) + 0.13 * (lines - 1), 0.15
    width = left + len(column_names) * (cell + gap) + edge
    height = top + len(rows) * (cell + gap) + edge
    figure = _figure(width, height)
    if title:
        figure.text(left / width, 1 - 0.22 / height, title, size=11, weight="bold", color=_INK, va="center")
    for row, (name, images) in enumerate(rows.items()):
        bottom = height - top - (row + 1) * (cell + gap) + gap
        figure.text(
            (left - 0.12) / width,
            (bottom + cell / 2) / height,
            name,
            size=9,
            color=_INK,
            ha="right",
            va="center",
        )
        for column, image in enumerate(images):
            x = left + column * (cell + gap)
            axes = figure.add_axes((x / width, bottom / height, cell / width, cell / height))
            axes.imshow(np.asarray(to_pil(image)), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                axes.set_title("\n".join(names[column]), size=8, color=_MUTED, pad=5)
    if path is not None:
        figure.savefig(path)
    return figure


def cached_title(name: str, cur: float, method: str) -> str:
    """Return the title of a row of cached images: name, share reused and method."""
    return "\n".join([f"{name}, CUR {cur:.0%}", *textwrap.wrap(method, _TITLE_WIDTH)])


def router_heat_map(
    scores_TN: Tensor, plan_TN: Tensor, branch_names: Sequence[str], path: Path | None = None
) -> "Figure":
    """Draw the router's scores, with a dot at entries that the plan reuses.

    The step that runs first is at the top.

    Args:
        scores_TN: sigmoid of the logits, in 0 to 1; row T-1 is the noisiest and runs first.
        plan_TN: True where the branch is computed.
        branch_names: one a branch, in order.
        path: where to write a PNG as well.
    """
    num_steps, num_branches = scores_TN.shape
    if plan_TN.shape != scores_TN.shape or len(branch_names) != num_branches:
        raise ValueError(
            f"scores have shape {tuple(scores_TN.shape)}, the plan {tuple(plan_TN.shape)}, "
            f"and there are {len(branch_names)} branch names"
        )
    scores = scores_TN.detach().float().cpu().numpy()
    reused = ~plan_TN.bool().cpu().numpy()
    cell = min(0.26, 13 / num_branches, 9 / num_steps)  # inches
    figure = _figure(max(5.5, cell * num_branches + 2.0), max(2.8, cell * num_steps + 1.8), "constrained")
    axes = figure.subplots()
    image = axes.imshow(scores, cmap="viridis", vmin=0, vmax=1, origin="lower", aspect="auto")
    step, branch = np.nonzero(reused)
    axes.scatter(branch, step, s=(72 * cell * 0.3) ** 2, color="white", edgecolors=_INK, linewidths=0.5)
    every = math.ceil(0.13 / cell)
    for axis, labels in ((axes.xaxis, branch_names), (axes.yaxis, range(num_steps))):
        # Steps are labelled from the top down, so that the first run one always is.
        first = 0 if axis is axes.xaxis else (num_steps - 1) % every
        axis.set_ticks(range(first, len(labels), every), [str(label) for label in labels[first::every]])
        axis.set_ticks(np.arange(len(labels) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.4)
    axes.tick_params(which="both", length=0, labelsize=7, labelcolor=_MUTED)
    axes.tick_params(axis="x", rotation=90)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("step i  (noisiest, run first, at the top)", size=8, color=_INK)
    axes.set_xlabel("branch", size=8, color=_INK)
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=30)
    bar.set_label("score r", size=8, color=_INK)
    bar.ax.tick_params(labelsize=7, labelcolor=_MUTED, length=2)
    bar.outline.set_visible(False)
    axes.set_title(f"CUR {reused.mean():.1%}", loc="left", size=11, weight="bold", color=_INK, pad=8)
    axes.set_title(f"\u25cb {reused.sum()} of {reused.size} reused", loc="right", size=8, color=_MUTED, pad=8)
    if path is not None:
        figure.savefig(path)
    return figure
