"""Forecast by a ridge regression of values on Chebyshev polynomials: Spectrum.

Spectrum is arXiv 2603.01623. Values are seen as a function of the step, scaled to [-1, 1]. Its
coefficients are fitted to all values that the cache keeps, the function is read at the step to predict, and
the result is blended with a Taylor series of order 1, half and half as in the authors' example. Here the fit
is of differences from the newest value, so that the coefficients sum to 1 and a constant is predicted
exactly; the paper's fit shrinks the constant a little too.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from harmonica.core.plan import Plan

from .forecast_tables import with_forecasts
from .taylorseer import monomial, series

DEGREE, RIDGE, VALUES, BLEND = 4, 0.1, 100, 0.5


def spectrum(
    plan: Plan, degree: int = DEGREE, ridge: float = RIDGE, values: int = VALUES, blend: float = BLEND
) -> Plan:
    """Return the plan with Chebyshev forecasts.

    Args:
        degree: of the polynomial.
        ridge: the penalty on each coefficient.
        values: how many of the last computed values are kept and fitted, at most.
        blend: share of the polynomial; the rest is the Taylor series.
    """
    fit = partial(blended, num_steps=plan.num_steps, degree=degree, ridge=ridge, blend=blend)
    return with_forecasts(plan, min(values, plan.num_steps) - 1, fit)


def blended(step: int, computed: Sequence[int], *, blend: float, **fit: Any) -> list[float]:
    """Return the coefficients of the values in the blend at a step."""
    fitted = regression(step, computed, **fit)
    line = series(step, computed[:2], monomial) + [0.0] * (len(computed) - 2)
    return [blend * one + (1 - blend) * other for one, other in zip(fitted, line, strict=True)]


def regression(
    step: int, computed: Sequence[int], *, num_steps: int, degree: int, ridge: float
) -> list[float]:
    """Return the coefficients of the values in the fitted function at a step."""
    scaled = 2 * np.array([step, *computed]) / (num_steps - 1) - 1
    basis = np.polynomial.chebyshev.chebvander(scaled, degree)[:, 1:]
    at, features = basis[0] - basis[1], basis[1:] - basis[1]
    gram = features.T @ features + ridge * np.eye(degree)
    found = at @ np.linalg.solve(gram, features.T)
    found[0] = 1 - found[1:].sum()
    return [float(each) for each in found]
