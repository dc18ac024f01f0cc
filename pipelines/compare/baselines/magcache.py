"""Reuse steps while the blocks' residual keeps its magnitude: MagCache.

MagCache is arXiv 2506.09045 (Section 3.3), and `MagCacheConfig` of diffusers. The ratio r of a step is that
of the norms of what the blocks add there and at the step before, averaged over tokens. A reused step's error
is `|1 - product of r since the last computed step|`; steps are reused while these errors add up to less than
a threshold, and at most K running. The first fifth of the steps are computed. Ratios are averages over
images, measured once, as there, so that the schedule is a plan. Here reused branches have the step's own
gates, where the paper adds the blocks' sum as it was, which is worse (tests/benchmarks/RESULTS.md).
"""

from collections.abc import Sequence

import numpy as np
import torch

from harmonica.core.plan import Plan
from harmonica.core.plan_builders import stepwise_plan
from harmonica.core.trajectory import full_step
from harmonica.data.batch import Batch
from harmonica.models.base import run_all
from harmonica.samplers import Sampler

from .schedules import is_fast_enough

LONGEST, RETAINED = (1, 2, 3), 0.2
"""Numbers of steps running that are tried, the smallest first; the share of steps that are never reused."""
_THRESHOLDS = np.geomspace(1e-4, 10, 400)


def magcache(sampler: Sampler, batches: Sequence[Batch], speedup: float) -> Plan:
    """Return the plan of the smallest K and threshold with which a speed is reached.

    If none is fast enough, it is the fastest one.
    """
    ratios, macs = magnitude_ratios(sampler, batches), sampler.model.macs()
    for longest in LONGEST:
        for threshold in _THRESHOLDS:
            reused = reused_steps(ratios, float(threshold), longest)
            plan = stepwise_plan(sampler.num_steps, len(macs.branches), reused)
            if is_fast_enough(plan, macs, speedup):
                return plan
    return plan


def reused_steps(ratios: Sequence[float], threshold: float, longest: int) -> list[int]:
    """Return the steps to reuse.

    Args:
        ratios: of each step T-1 ... 0 to the one before it, in that order; the first one is not used.
        longest: how many steps running may be reused.
    """
    reused, (product, error, run) = list[int](), (1.0, 0.0, 0)
    for place in range(max(1, round(RETAINED * len(ratios))), len(ratios)):
        product *= ratios[place]
        error, run = error + abs(1 - product), run + 1
        if error <= threshold and run <= longest:
            reused.append(len(ratios) - 1 - place)
        else:
            product, error, run = 1.0, 0.0, 0
    return reused


@torch.no_grad()
def magnitude_ratios(sampler: Sampler, batches: Sequence[Batch]) -> list[float]:
    """Return the ratio of each step T-1 ... 0, the first one 1."""
    total = np.zeros(sampler.num_steps)
    for batch in batches:
        state, before_NL = batch.start(sampler), None
        for place, i in enumerate(reversed(range(sampler.num_steps))):
            hidden_NLD, conditioning = sampler.embed(i, state)
            after_NLD = run_all(sampler.model.branches, hidden_NLD, conditioning)
            norm_NL = (after_NLD - hidden_NLD).norm(dim=-1)
            total[place] += 1.0 if before_NL is None else float((norm_NL / before_NL).mean())
            before_NL = norm_NL
            state, _ = full_step(sampler, i, state)
    return [float(each) for each in total / len(batches)]
