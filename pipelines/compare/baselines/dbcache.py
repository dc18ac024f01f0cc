"""Reuse blocks while the first blocks' residual stays alike: DBCache.

DBCache is of the library cache-dit, after FirstBlockCache of ParaAttention. The first F blocks are computed
at every step. If what they add to the hidden state differs from what they added at the last whole step by
less than a threshold (`mean |r' - r| / mean |r|`), all further blocks but the last B are reused. A batch has
one decision there too. Here the differences are averages over images, measured once along full
trajectories, so that the schedule is a plan; and reused branches have the step's own gates, where the
library adds the remaining blocks' sum as it was.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from harmonica.core.plan import Plan
from harmonica.core.trajectory import full_step
from harmonica.data.batch import Batch
from harmonica.models.base import run_all
from harmonica.samplers import Sampler

from .schedules import branches_of_blocks, first_fast_enough

LONGEST, WARMUP_STEPS = 8, 2


def dbcache(
    sampler: Sampler, batches: Sequence[Batch], speedup: float, *, first: int = 1, last: int = 0
) -> Plan:
    """Return the plan of the smallest threshold with which a speed is reached.

    Args:
        first: blocks at the start that are computed at every step, F, 1 or more.
        last: blocks at the end that are computed at every step, B.
    """
    sizes, macs = branches_of_blocks(sampler.model), sampler.model.macs()
    head, tail = sum(sizes[:first]), sum(sizes[len(sizes) - last :])
    changes_TT = residual_changes(sampler, batches, head)
    partial = (True,) * head + (False,) * (sum(sizes) - head - tail) + (True,) * tail
    whole = (True,) * sum(sizes)

    def plan_of(threshold: float) -> Plan:
        reused = set(partial_steps(changes_TT, threshold))
        return Plan(tuple(partial if i in reused else whole for i in range(sampler.num_steps)))

    # Just above each difference, where the schedule changes.
    thresholds = (changes_TT[changes_TT.isfinite()] * (1 + 1e-9)).unique().tolist()
    return first_fast_enough(map(plan_of, thresholds), macs, speedup)


def partial_steps(changes_TT: Tensor, threshold: float) -> list[int]:
    """Return the steps that reuse blocks under a threshold, the noisiest first."""
    found, whole = list[int](), len(changes_TT) - WARMUP_STEPS
    for i in reversed(range(whole)):
        if changes_TT[i, whole] < threshold:
            found.append(i)
        else:
            whole = i
    return found


@torch.no_grad()
def residual_changes(sampler: Sampler, batches: Sequence[Batch], head: int) -> Tensor:
    """Return how much the first branches' residuals differ between steps (T, T).

    Entry (i, j) is of step i from step j, 1 to `LONGEST` steps before it; others are infinite.
    """
    model, num_steps = sampler.model, sampler.num_steps
    changes_TT = torch.zeros(num_steps, num_steps, dtype=torch.float64)
    for batch in batches:
        state, kept = batch.start(sampler), dict[int, Tensor]()
        for i in reversed(range(num_steps)):
            hidden_NLD, conditioning = sampler.embed(i, state)
            kept[i] = run_all(model.branches[:head], hidden_NLD, conditioning) - hidden_NLD
            kept.pop(i + LONGEST + 1, None)
            for j in range(i + 1, min(i + LONGEST, num_steps - 1) + 1):
                change = (kept[i] - kept[j]).abs().mean() / kept[j].abs().mean()
                changes_TT[i, j] += change / len(batches)
            state, _ = full_step(sampler, i, state)
    return changes_TT.masked_fill(changes_TT == 0, torch.inf)
