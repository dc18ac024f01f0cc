"""Forecast by a BDF2 step and calibrate by Heun's rule: FoCa.

Equations 7 and 8 of Zheng et al. 2025, arXiv 2508.16211, as the author of cache-dit quotes them, with steps
of length 1. F(k) and F(k - 1) are a branch's values at the last two steps, computed or forecast:

    forecast      P = 4/3 F(k) - 1/3 F(k - 1) + 2/3 F'(k)                     (7)
    calibration   F(k + 1) = F(k) + 1/2 [F'(last computed) + F'(k + 1)]       (8)

Heun's rule wants the slope F'(k + 1) of a step that is not computed; the forecast gives it, as P - F(k).
F'(k) is F(k) - F(k - 1). F'(last computed) is the change between the last two computed values, divided by
their distance. All of it is linear, so that forecasts of forecasts are sums of computed values.
"""

from collections.abc import Sequence

import numpy as np

from harmonica.core.plan import Plan

from .forecast_tables import with_forecasts

Sum = np.ndarray
"""The coefficient of each computed value, newest first."""

VALUES = 6
"""Computed values that are kept. The recursion goes back to the first step; before the oldest value kept it
is taken to have been a straight line."""


def foca(plan: Plan, values: int = VALUES) -> Plan:
    """Return the plan with FoCa's forecasts.

    Args:
        values: how many of the last computed values are kept, two or more.
    """
    return with_forecasts(plan, values - 1, calibrated)


def calibrated(step: int, computed: Sequence[int]) -> list[float]:
    """Return the coefficients of the values in the forecast of a step."""
    values = np.eye(len(computed))
    slopes = [(values[k] - values[k + 1]) / (computed[k + 1] - computed[k]) for k in range(len(computed) - 1)]
    before = values[-2] - slopes[-1]
    for k in reversed(range(1, len(slopes))):
        # The value of the step before the next computed one, a forecast where that step was reused.
        before = _recursion(values[k], slopes[k], before, computed[k] - computed[k - 1] - 1)
    found = _recursion(values[0], slopes[0], before, computed[0] - step)
    return [float(each) for each in found]


def _recursion(now: Sum, slope: Sum, before: Sum, steps: int) -> Sum:
    """Return the value some steps after a computed one.

    Args:
        now: the computed value.
        slope: the derivative there, of computed values.
        before: the value of the step before.
    """
    for _ in range(steps):
        forecast = 4 / 3 * now - before / 3 + 2 / 3 * (now - before)
        now, before = now + (slope + forecast - now) / 2, now
    return now
