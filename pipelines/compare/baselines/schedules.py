"""Schedules of whole steps that published methods choose, as plans.

TeaCache (arXiv 2411.19108) reuses whole steps until an accumulated change passes a threshold. Changes are
averages over images, measured once, so that the schedule is a plan. TeaCache estimates the output's change
from its input; here it is that of the model's guided output itself, which needs no guess.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from harmonica.core.plan import Plan
from harmonica.core.plan_builders import stepwise_plan
from harmonica.core.trajectory import Trajectory
from harmonica.data.batch import Batch
from harmonica.models.base import BranchedTransformer, Macs
from harmonica.samplers import Sampler

INTERVALS = range(2, 7)
"""Intervals of TaylorSeer's experiments."""
_NEAR = 0.985
"""Fraction of a speed at which a plan counts as reaching it, since whole steps meet few speeds exactly."""
_THRESHOLDS, _TRIALS = (1e-4, 10.0), 10


def interval_plan(num_steps: int, num_branches: int, interval: int, first: int = 3) -> Plan:
    """Return the plan that computes the first steps and then every `interval`-th one.

    TaylorSeer and FORA have such schedules.
    """
    reused = [i for i in range(num_steps - first) if (num_steps - first - i) % interval]
    return stepwise_plan(num_steps, num_branches, reused)


def thresholded_steps(changes: Sequence[float], threshold: float, longest: int) -> list[int]:
    """Return the steps to reuse under a threshold of accumulated change.

    A step is reused as long as the changes since the last computed step add up to less.

    Args:
        changes: of each step T-1 ... 0 since the one before it, in that order; the first one is not used.
        longest: how many steps running may be reused.
    """
    reused, total, run = [], 0.0, 0
    for place in range(1, len(changes)):
        total += changes[place]
        if total < threshold and run < longest:
            reused.append(len(changes) - 1 - place)
            run += 1
        else:
            total, run = 0.0, 0
    return reused


def threshold_plan(changes: Sequence[float], macs: Macs, speedup: float, longest: int = 4) -> Plan:
    """Return the plan of the smallest threshold with which a speed is reached."""
    thresholds = sorted(np.cumsum(sorted(changes[1:])).tolist() + list(changes[1:]))

    def plan_of(threshold: float) -> Plan:
        reused = thresholded_steps(changes, threshold * (1 + 1e-9), longest)
        return stepwise_plan(len(changes), len(macs.branches), reused)

    return first_fast_enough(map(plan_of, thresholds), macs, speedup)


def first_fast_enough(plans: Iterable[Plan], macs: Macs, speedup: float) -> Plan:
    """Return the first of the plans that reaches a speed; the last one if none does.

    Args:
        plans: from slow to fast, one or more.
    """
    for plan in plans:
        if is_fast_enough(plan, macs, speedup):
            break
    return plan


def bisected(plan_of: Callable[[float], Plan], macs: Macs, speedup: float) -> Plan:
    """Return the plan of the smallest threshold found with which a speed is reached.

    For thresholds whose plans each take a trajectory; if none is fast enough, the highest one's is returned.
    """
    low, high = _THRESHOLDS
    best = plan_of(high)
    for _ in range(_TRIALS):
        middle = (low * high) ** 0.5
        plan = plan_of(middle)
        if is_fast_enough(plan, macs, speedup):
            best, high = plan, middle
        else:
            low = middle
    return best


def is_fast_enough(plan: Plan, macs: Macs, speedup: float) -> bool:
    """Return whether a plan reaches a speed, up to 1.5%."""
    return plan.ideal_speedup(macs) >= _NEAR * speedup


def branches_of_blocks(model: BranchedTransformer) -> list[int]:
    """Return the number of branches of each block, in order.

    A block's branches have names that end with its number.
    """
    return [len(list(each)) for _, each in groupby(model.branches, lambda one: one.name.split()[-1])]


@torch.no_grad()
def output_changes(sampler: Sampler, batches: Sequence[Batch]) -> list[float]:
    """Return TeaCache's change of each step T-1 ... 0.

    It is the relative L1 distance from the output of the step before (equations 3 to 5 there).
    """
    total = np.zeros(sampler.num_steps)
    for batch in batches:
        for place, (before, now) in enumerate(_outputs(sampler, batch), start=1):
            total[place] += float((now - before).abs().mean() / before.abs().mean())
    return [float(each) for each in total / len(batches)]


def _outputs(sampler: Sampler, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the guided outputs of neighbouring steps, the earlier one first."""
    trajectory, last = Trajectory(sampler, None, "hold", None), None
    trajectory.start(batch.noise_NCHW, batch.condition_N, batch.keys)
    for i in reversed(range(sampler.num_steps)):
        _, now = trajectory.step(i)
        if last is not None:
            yield last, now
        last = now
