"""The weights of a plan that are fitted.

They are those of its forecasts and of its output's correction.

Shapes: T steps, B branches, U units (branches, or segments where the plan has any), K differences of a
forecast, J of a correction.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from harmonica.core.plan import Plan, correction_of, forecast_of
from harmonica.core.plan_builders import with_fixed_correction
from harmonica.training.forecast_config import ForecastConfig

Unknown = tuple[int, int, int]
"""An unknown weight: step, branch (`OUTPUT` for the model's output) and number of the difference."""
OUTPUT = -1
"""In place of a branch: the weight corrects the model's output."""
LEAST_STEPS = 20
"""In fewer, outputs do not lie near a line, and a fit that begins at the fixed correction ends up to 1.6 dB
farther from the full images (tests/benchmarks/RESULTS.md)."""


def unknowns(plan: Plan, order: int, corrections: int = 0) -> list[Unknown]:
    """Return the weights to fit of a plan, by its segments where it has any.

    A reused entry has as many as it has earlier values. Outputs are corrected from the first step that
    reuses anything.

    Args:
        corrections: number of differences that correct an output, J.
    """
    plan, found = plan.by_segment(), list[Unknown]()
    computed = [0] * plan.num_branches
    for i in reversed(range(plan.num_steps)):
        for branch, is_computed in enumerate(plan.compute[i]):
            if is_computed:
                computed[branch] += 1
            else:
                found += [(i, branch, k) for k in range(min(order, computed[branch] - 1))]
    reused = [i for i, row in enumerate(plan.compute) if not all(row)]
    for i in reversed(range(1 + max(reused, default=-1))):
        found += [(i, OUTPUT, k) for k in range(min(corrections, plan.num_steps - 1 - i))]
    return found


def linear_weights(plan: Plan, order: int) -> Tensor:
    """Return the weights (T, B, order) of the linear forecast.

    They are (T, S, order) of a plan with segments. The fit starts from them.
    """
    plan = plan.by_segment()
    weights_TBK = torch.zeros(plan.num_steps, plan.num_branches, order, dtype=torch.float64)
    for branch in range(plan.num_branches):
        last = before = -1
        for i in reversed(range(plan.num_steps)):
            if plan.compute[i][branch]:
                last, before = i, last
            elif before > 0:
                weights_TBK[i, branch, 0] = (last - i) / (before - last)
    return weights_TBK


def first_correction(plan: Plan, config: ForecastConfig) -> Tensor:
    """Return the weights of a plan's correction (T, J) from which its fit begins.

    They are the fixed ones, of which there may be more than asked for, and zeros where steps are few; none
    where none is asked for.
    """
    if not config.corrections or plan.num_steps < LEAST_STEPS:
        return torch.zeros(plan.num_steps, config.corrections, dtype=torch.float64)
    fixed = with_fixed_correction(plan)
    first_TJ = torch.zeros(plan.num_steps, max(config.corrections, fixed.corrections), dtype=torch.float64)
    if fixed.correction:
        first_TJ[:, : fixed.corrections] = torch.tensor(fixed.correction, dtype=torch.float64)
    return first_TJ


@dataclass(frozen=True)
class FittedWeights:
    """The weights of a plan that are fitted."""

    forecast_TUK: Tensor
    """Of each unit: a branch, or a segment where the plan has any."""
    correction_TJ: Tensor

    def moved(self, moves: Iterable[tuple[Unknown, float]]) -> "FittedWeights":
        """Return other weights, some of which differ by so much."""
        forecast_TUK, correction_TJ = self.forecast_TUK.clone(), self.correction_TJ.clone()
        for (i, unit, k), by in moves:
            if unit == OUTPUT:
                correction_TJ[i, k] += by
            else:
                forecast_TUK[i, unit, k] += by
        return FittedWeights(forecast_TUK, correction_TJ)

    def forecast_of(self, plan: Plan) -> Tensor:
        """Return the weights of the forecasts (T, B, K) of a plan's branches."""
        lengths = torch.tensor([len(each) for each in plan.segment_ranges])
        return self.forecast_TUK.repeat_interleave(lengths, 1)

    def of(self, plan: Plan) -> Plan:
        """Return the plan with these weights."""
        correction = correction_of(self.correction_TJ) if self.correction_TJ.shape[1] else None
        return Plan(plan.compute, forecast_of(self.forecast_of(plan)), correction, plan.segments)
