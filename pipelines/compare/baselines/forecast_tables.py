"""Forecasts of published methods as the forecast weights of a plan.

Every method here predicts a branch's value as a linear combination of its last computed values, with
coefficients that follow from the steps alone. So each becomes a table of weights, and all run through the
same cache and kernels as our own forecasts. Shapes: T steps, B branches, K differences.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from harmonica.core.plan import Plan, forecast_of

Coefficients = Callable[[int, Sequence[int]], Sequence[float]]
"""Takes the step to predict and the steps at which values were computed, newest first, two or more; returns
the coefficient of each of the newest values, as many as it uses, with the sum 1."""


def with_forecasts(plan: Plan, order: int, coefficients: Coefficients) -> Plan:
    """Return the plan whose reused entries forecast with a method's coefficients.

    Args:
        order: the number of differences, so that each entry uses up to `order + 1` values.
    """
    weights_TBK = torch.zeros(plan.num_steps, plan.num_branches, order, dtype=torch.float64)
    computed: list[list[int]] = [[] for _ in range(plan.num_branches)]
    for i in reversed(range(plan.num_steps)):
        for branch, is_computed in enumerate(plan.compute[i]):
            if is_computed:
                computed[branch].insert(0, i)
            elif len(computed[branch]) > 1:
                found = difference_weights(coefficients(i, computed[branch][: order + 1]))
                weights_TBK[i, branch, : len(found)] = torch.tensor(found, dtype=torch.float64)
    return Plan(plan.compute, forecast_of(weights_TBK))


def difference_weights(coefficients: Sequence[float]) -> list[float]:
    """Return weights w of differences for coefficients a of values, newest first.

    `v1 + w1 (v1 - v2) + w2 (v2 - v3) + ...` is `a1 v1 + a2 v2 + ...` where the sum of a is 1.
    """
    return [total - 1 for total in accumulate(coefficients)][:-1]
