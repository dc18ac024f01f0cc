"""Verify one block of a forecast step, and compute the next if it failed: SpeCa.

SpeCa is Liu et al. 2025, arXiv 2509.11628. A reused step's last block is computed as well, and compared with
its forecast by TaylorSeer: `|F' - F| / |F|`, Euclidean. After an error above `tau * beta^p`, with p the part
of the trajectory that is done, the next step is computed, as in the authors' code, and after a run of
`LONGEST`; by default it does not verify the first two drafts of a run. Here errors are averages over images,
measured once along a speculative trajectory, so that the schedule is a plan. It computes the last block at
every step: that is verification's cost, and the block is used, where the authors throw it away. Features
are branches' values, not the hidden state after the block; tau is set to the speed.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from harmonica.core.cache import BranchCache
from harmonica.core.plan import Plan, forecast_of
from harmonica.core.trajectory import planned_step
from harmonica.data.batch import Batch
from harmonica.samplers import Sampler

from .forecast_tables import difference_weights
from .schedules import bisected, branches_of_blocks
from .taylorseer import monomial, series, taylorseer

FIRST, LONGEST, ORDER, DECAY, FLOOR = 3, 5, 4, 0.01, 0.1
"""Defaults of the authors' code for DiT; the floor is a fraction of tau (there 0.01, of 0.1)."""


def speca(sampler: Sampler, batches: Sequence[Batch], speedup: float) -> Plan:
    """Return the plan of the smallest tau found with which a speed is reached.

    After the first three at least every second step is reused, whatever the speed.
    """
    plan = bisected(lambda tau: speculative_plan(sampler, batches, tau), sampler.model.macs(), speedup)
    return taylorseer(plan, ORDER)


def threshold(step: int, num_steps: int, tau: float) -> float:
    """Return the error above which a step is computed; steps count down."""
    return tau * max(math.pow(DECAY, (num_steps - step) / num_steps), FLOOR)


class _Verifier(BranchCache):
    """A cache that forecasts by TaylorSeer, and only compares verified values."""

    is_draft = False
    errors: list[float]

    def weights(self, branch: int, step: int) -> list[float]:
        return difference_weights(series(step, [at for at, _ in self._kept[branch]], monomial))

    def write(self, branch: int, step: int, value: Tensor) -> None:
        if self.is_draft:
            wrong_NP, value_NP = (self.read(branch, step) - value).flatten(1), value.flatten(1)
            self.errors.append(float((wrong_NP.norm(dim=1) / value_NP.norm(dim=1)).mean()))
        else:
            super().write(branch, step, value)


@torch.no_grad()
def speculative_plan(sampler: Sampler, batches: Sequence[Batch], tau: float) -> Plan:
    """Return what speculation computes, by errors averaged over the batches."""
    num_steps, count = sampler.num_steps, len(sampler.model.branches)
    last = branches_of_blocks(sampler.model)[-1]
    draft = (False,) * (count - last) + (True,) * last
    caches = [_Verifier(count, "forecast", forecast_of(torch.zeros(1, 1, ORDER))) for _ in batches]
    states = [batch.start(sampler) for batch in batches]
    rows, run, error = list[tuple[bool, ...]](), 0, 0.0
    for i in reversed(range(num_steps)):
        is_whole = len(rows) < FIRST or run == LONGEST or error > threshold(i, num_steps, tau)
        rows.append((True,) * count if is_whole else draft)
        for place, cache in enumerate(caches):
            cache.is_draft, cache.errors = not is_whole, []
            states[place], _ = planned_step(sampler, i, states[place], rows[-1], cache)
        run = 0 if is_whole else run + 1
        error = sum(sum(cache.errors) for cache in caches) / (last * len(caches))
    return Plan(tuple(reversed(rows)))
