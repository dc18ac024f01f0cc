"""Make rows of a sample sheet that show amplified differences of images.

Shapes: N images of a row, C channels, H W image.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_FACTORS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_SHARE_WITHIN = 0.995
"""Fraction of the differences that must stay within the range of grey levels."""


def amplification(differences: Tensor) -> int:
    """Return the largest round factor that keeps most differences in [-1, 1]."""
    sizes = differences.abs().float().flatten()
    largest = float(sizes.kthvalue(max(1, int(_SHARE_WITHIN * len(sizes)))).values)
    return max((factor for factor in _FACTORS if factor * largest <= 1), default=1)


def with_differences(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows, each but the first followed by its difference from the first.

    Differences are amplified, and zero is mid grey.

    All have one factor, which their labels tell, so that they can be compared.

    Args:
        rows: by title, each (N, C, H, W) in [-1, 1], the full sampler's first. What stands before a title's
            first comma names the row in its difference's title.
    """
    (_, reference_NCHW), *others = rows.items()
    if not others:
        return dict(rows)
    differences = {name: images_NCHW - reference_NCHW for name, images_NCHW in others}
    factor = amplification(torch.stack(list(differences.values())))
    sheet = {name: images_NCHW for name, images_NCHW in rows.items() if name not in differences}
    for name, difference_NCHW in differences.items():
        sheet[name] = rows[name]
        sheet[f"{name.splitlines()[0].split(',')[0]} minus full,\ntimes {factor}"] = difference_NCHW * factor
    return sheet
