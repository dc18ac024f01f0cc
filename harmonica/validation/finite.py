"""Checks for infinity and NaN, which must reach no image, metric or router.

The checks run once, at the end of a trajectory, since a check inside it would synchronise the device.
"""

import math
from collections.abc import Mapping

from torch import Tensor

CURE = (
    "the weights or the router are damaged, or half precision overflows: with model.dtype float16 give "
    "bfloat16 or float32, else another checkpoint"
)


class NotFinite(ArithmeticError):
    """A computed value is infinite or NaN."""


def check_finite(values_N: Tensor, what: str, cure: str = CURE) -> None:
    """Check that all values are finite.

    Args:
        values_N: rows (N, ...).
        what: what errors call them, with a verb: "the images of variant full are".

    Raises:
        NotFinite: some of the rows are not finite; the message says how many.
    """
    fine_N = values_N.isfinite().flatten(1).all(1)
    if not fine_N.all():
        count = len(fine_N) - int(fine_N.sum())
        raise NotFinite(f"{what} not finite ({count} of {len(fine_N)}): {cure}")


def not_finite(metrics: Mapping[str, float]) -> str:
    """Return the first number that is not finite, with its value; "" for none."""
    return next((f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)), "")
