"""Fit linear predictors of a branch's value, one for each timestep: L2P.

L2P is arXiv 2604.26365: least squares of the value that a full trajectory has at the reused step on the
last computed values of the same trajectory. What differs from our own fit is what is fitted: the branch's
value here, the final image there.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from harmonica.core.cache import BranchCache
from harmonica.core.plan import Plan, forecast_of
from harmonica.core.trajectory import planned_step
from harmonica.data.batch import Batch
from harmonica.samplers import Sampler

_RIDGE = 1e-3  # of the mean diagonal: values of neighbouring steps are nearly collinear


class _Recorder(BranchCache):
    """A cache that sums up products of differences for each reused entry of a plan."""

    plan: Plan
    order: int
    sums: dict[tuple[int, int], Tensor]

    def write(self, branch: int, step: int, value: Tensor) -> None:
        """Keep the value where the plan computes; else compare it with what is kept."""
        kept = [each.flatten() for _, each in self._kept[branch]]
        if self.plan.compute[step][branch]:
            super().write(branch, step, value)
        elif len(kept) > 1:
            differences = [newer - older for newer, older in pairwise(kept)]
            rows = torch.stack([*differences, value.flatten() - kept[0]]).double()
            products = rows @ rows.T
            entry = (step, branch)
            self.sums[entry] = self.sums[entry] + products if entry in self.sums else products


@torch.no_grad()
def l2p(plan: Plan, sampler: Sampler, batches: Sequence[Batch], order: int = 3) -> Plan:
    """Return the plan with predictors fitted on full trajectories of some batches."""
    everything = (True,) * plan.num_branches
    sums: dict[tuple[int, int], Tensor] = {}
    for batch in batches:
        zeros = torch.zeros(plan.num_steps, plan.num_branches, order)
        cache = _Recorder(plan.num_branches, "forecast", forecast_of(zeros))
        cache.plan, cache.order, cache.sums = plan, order, sums
        state = batch.start(sampler)
        for i in reversed(range(plan.num_steps)):
            state, _ = planned_step(sampler, i, state, everything, cache)
    weights_TBK = torch.zeros(plan.num_steps, plan.num_branches, order, dtype=torch.float64)
    for (i, branch), products in sums.items():
        gram, right = products[:-1, :-1], products[:-1, -1]
        ridge = _RIDGE * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(len(gram)).double()
        weights_TBK[i, branch, : len(gram)] = torch.linalg.solve(gram + ridge, right)
    return Plan(plan.compute, forecast_of(weights_TBK))
