"""Forecast with Hermite polynomials in place of TaylorSeer's monomials: HiCache.

Source: Feng et al. 2025, arXiv 2508.16984. The i-th derivative is multiplied by `s^i H_i(s x) / i!`, with
the physicists' Hermite polynomials H_i and a scale s that is applied twice, to the argument and to the
result ("dual scaling").
"""

import math
from functools import partial

from harmonica.core.plan import Plan

from .forecast_tables import with_forecasts
from .taylorseer import series

SCALE = 0.5
"""Default of the authors' code; between 0.5 and 0.7 in their scripts."""


def hicache(plan: Plan, order: int, scale: float = SCALE) -> Plan:
    """Return the plan with HiCache's forecasts of an order, 1 or more."""
    return with_forecasts(plan, order, partial(series, basis=partial(scaled_hermite, scale=scale)))


def scaled_hermite(i: int, x: float, scale: float) -> float:
    """Return `scale^i H_i(scale x) / i!`."""
    return scale**i * hermite(i, scale * x) / math.factorial(i)


def hermite(i: int, x: float) -> float:
    """Return the physicists' Hermite polynomial H_i at x.

    The recurrence is `H_{n+1} = 2 x H_n - 2 n H_{n-1}`.
    """
    before, now = 0.0, 1.0
    for n in range(i):
        before, now = now, 2 * x * now - 2 * n * before
    return now
