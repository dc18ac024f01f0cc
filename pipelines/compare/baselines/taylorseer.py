"""Forecast by a Taylor series of the last computed values: TaylorSeer.

Equation 3 of Liu et al. 2025, arXiv 2503.06923: `F(t - k) = sum over i <= m of D_i (-k)^i / i!`, with
finite differences D_i of the computed values, each divided by the distance of the last two. HiCache shares
the differences.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

from harmonica.core.plan import Plan

from .forecast_tables import with_forecasts

Basis = Callable[[int, float], float]
"""Takes i and the signed distance x to predict over; returns the factor of the i-th derivative."""


def taylorseer(plan: Plan, order: int) -> Plan:
    """Return the plan with TaylorSeer's forecasts of an order, 1 or more."""
    return with_forecasts(plan, order, partial(series, basis=monomial))


def monomial(i: int, x: float) -> float:
    """Return x^i / i!."""
    return x**i / math.factorial(i)


def series(step: int, computed: Sequence[int], basis: Basis) -> list[float]:
    """Return the coefficients of the values in the series, for the step to predict."""
    derivatives = divided_differences(computed)
    x = step - computed[0]
    used = [basis(i, x) for i in range(len(derivatives))]
    return [
        sum(factor * row[k] for factor, row in zip(used, derivatives, strict=True))
        for k in range(len(computed))
    ]


def divided_differences(computed: Sequence[int]) -> list[list[float]]:
    """Return the coefficients of the values in the derivatives of order 0, 1, ...

    Values are newest first. As in the authors' code, which keeps derivatives from one computed step to the
    next: the i-th is the change of the one before it since the last computed step, divided by the distance
    to that step.
    """
    count = len(computed)
    before: list[list[float]] = []
    for oldest in reversed(range(count)):
        value = [float(k == oldest) for k in range(count)]
        now = [value]
        for last in before:
            gap = computed[oldest] - computed[oldest + 1]
            now.append([(a - b) / gap for a, b in zip(now[-1], last, strict=True)])
        before = now
    return before
