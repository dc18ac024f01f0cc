"""Build plans for a speed.

The module holds the share to reuse, the start of training, and the threshold of scores.

Speed is counted in multiply-accumulates, full over planned; `tests/benchmarks` has what is realised of it.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from harmonica.core.plan import Plan
from harmonica.core.router import FIXED_LOGIT
from harmonica.models.base import Macs

_NEAR = 0.015
"""Relative tolerance of the speed within which only whole steps are reused."""
_ROUNDING = 1e-9
_TIE = 1e-6
"""Scores that differ by less count as equal, since devices round a sigmoid differently."""


def fastest_speedup(num_steps: int, macs: Macs) -> float:
    """Return the speed of the plan that computes branches at step T-1 alone."""
    return num_steps * macs.full / (macs.full + (num_steps - 1) * macs.rest)


def slowest_speedup(num_steps: int, macs: Macs) -> float:
    """Return the lowest speed for which `even_plan` reuses anything.

    That is half of a step, or, where no whole step comes near enough, half of its last branch.
    """
    whole, of_step = num_steps * macs.full, sum(macs.branches)
    part = max(1 / (1 - _NEAR), whole / (whole - macs.branches[-1] / 2))
    return min(part, whole / (whole - of_step / 2))


def speedup_of(cur: float, macs: Macs) -> float:
    """Return the speed of a plan that reuses this fraction of all entries.

    Whole steps are reused.
    """
    return macs.full / (macs.full - cur * sum(macs.branches))


def reusable_fraction(num_steps: int, macs: Macs, speedup: float) -> float:
    """Return the share of the MACs of steps 0 ... T-2 to reuse for a speed, 0 to 1.

    Raises:
        ValueError: the speed needs more reuse than there can be.
    """
    most = fastest_speedup(num_steps, macs)
    if speedup > most * (1 + _ROUNDING):
        raise ValueError(
            f"train.target_speedup is {speedup}: {num_steps} steps of this model reach {most:.2f} at most"
        )
    return (1 - 1 / speedup) * num_steps * macs.full / ((num_steps - 1) * sum(macs.branches))


def even_steps(
    num_steps: int, count: int, fixed: Collection[int] = (), *, is_flow_matching: bool = False
) -> list[int]:
    """Return `count` of the steps 0 ... T-2, evenly spread.

    No two are consecutive as long as they are at most half of all.

    Args:
        fixed: steps that are computed in any case; where too few others are left, all of those are returned.
        is_flow_matching: whether longer runs of reuse come after shorter ones; else before them.
    """
    if fixed:
        free = [i for i in range(num_steps - 1) if i not in fixed]
        places = even_steps(len(free) + 1, min(count, len(free)), is_flow_matching=is_flow_matching)
        return [free[place] for place in places]
    if (gap := (num_steps - 2) // max(1, count)) >= 2:
        # Equal gaps, from the first step that has two values before; what is left over is computed last.
        # Gaps of 2 and 3 in turn are worse by up to 7 dB (tests/benchmarks/RESULTS.md).
        return [num_steps - 3 - gap * k for k in reversed(range(count))]
    chosen: list[int] = []
    step = num_steps - 2
    for length in _run_lengths(count, num_steps - count, is_flow_matching):
        chosen += range(step, step - length, -1)
        step -= length + 1
    return chosen[::-1]


def _run_lengths(count: int, runs: int, is_flow_matching: bool) -> list[int]:
    """Return the lengths of the runs of reuse that `count` steps make.

    They go from the noisiest run on, and a computed step is between each two. The first one, which has a
    single value before, is about half as long as the others. Which of them should be longer where they cannot
    be alike was measured (tests/benchmarks/RESULTS.md): later ones under flow matching; with other samplers
    earlier ones, and a last one that is short as well.
    """
    if runs == 1 or not count:
        return [count]
    ends = 1 if is_flow_matching or runs == 2 else 2
    inner = runs - ends
    end = max(1, round(count / (2 * inner + ends)))
    shortest, longer = divmod(count - ends * end, inner)
    lengths = [shortest + (j + 1) * longer // inner - j * longer // inner for j in range(inner)]
    if is_flow_matching:
        return [end, *lengths]
    return [end, *reversed(lengths), *[end] * (ends - 1)]


def steps_for(num_steps: int, macs: Macs, speedup: float) -> tuple[int, float]:
    """Return the number of whole steps a speed reuses, and the fraction of one more.

    The fraction is of the step's MACs, 0 to 1.
    """
    steps = reusable_fraction(num_steps, macs, speedup) * (num_steps - 1)
    whole = stepwise_plan(num_steps, len(macs.branches), range(round(steps)))
    if abs(whole.ideal_speedup(macs) / speedup - 1) < _NEAR:
        return round(steps), 1.0
    return math.ceil(steps), steps - math.floor(steps)


def stepwise_plan(num_steps: int, num_branches: int, reused: Iterable[int]) -> Plan:
    """Return the plan that reuses these whole steps and computes all others."""
    chosen = set(reused)
    return Plan(tuple((i not in chosen,) * num_branches for i in range(num_steps)))


def with_part(plan: Plan, step: int, fraction: float, macs: Macs) -> Plan:
    """Return the plan with one step reused in part.

    Its last branches are reused, up to a fraction of its MACs.
    """
    wanted, row = fraction * sum(macs.branches), [True] * plan.num_branches
    for branch in reversed(range(plan.num_branches)):
        if wanted < macs.branches[branch] / 2:
            break
        row[branch] = False
        wanted -= macs.branches[branch]
    rows = [tuple(row) if i == step else before for i, before in enumerate(plan.compute)]
    return Plan(tuple(rows))


def even_plan(
    num_steps: int,
    macs: Macs,
    speedup: float,
    fixed: Collection[int] = (),
    *,
    is_flow_matching: bool = False,
) -> Plan:
    """Return the plan of a speed that reuses whole steps, evenly spread.

    The middle one is reused in part, as far as the speed needs. Consecutive reuse hurts images most, and
    reuse of different blocks at different steps is worse than of whole steps (tests/benchmarks/RESULTS.md).

    Args:
        fixed: steps that are computed in any case.
        is_flow_matching: whether longer runs of reuse come after shorter ones.
    """
    count, fraction = steps_for(num_steps, macs, speedup)
    chosen = even_steps(num_steps, count, fixed, is_flow_matching=is_flow_matching)
    plan = stepwise_plan(num_steps, len(macs.branches), chosen)
    if fraction == 1 or not chosen:
        return plan
    middle = chosen[len(chosen) // 2]
    plan = with_part(plan, middle, fraction, macs)
    if all(plan.compute[middle]):  # too small a part for any branch, as where all blocks are one
        fewer = even_steps(num_steps, count - 1, fixed, is_flow_matching=is_flow_matching)
        return stepwise_plan(num_steps, len(macs.branches), fewer)
    return plan


def with_fixed_correction(plan: Plan, share: float = 0.5) -> Plan:
    """Return the plan with a correction that needs no learning.

    A computed step shows what the reused ones right before it should have been: where outputs change evenly,
    they lie on the line between its output and that of the last computed step before them. What r reused
    steps lack to that line, times `share`, is added to its output. By the differences d_j of the last outputs
    (`harmonica.core.correction`) that is `share * sum over j = 0 ... r of (r / 2 - j) d_j`. The whole of it
    would be too much, since the model sees the error in its latents and makes up for a part of it itself.
    Ours; `tests/benchmarks/RESULTS.md` has what it is worth.
    """
    rows, run = [], 0
    for row in reversed(plan.compute):
        is_reused = not any(row)
        rows.append([] if is_reused or not run else [share * (run / 2 - j) for j in range(run + 1)])
        run = run + 1 if is_reused else 0
    longest = max(map(len, rows))
    if not longest:
        return plan
    correction = tuple((*row, *[0.0] * (longest - len(row))) for row in reversed(rows))
    return replace(plan, correction=correction)


def logits_of(plan: Plan, logit: float) -> Tensor:
    """Return the logits (T, B) of a plan.

    They are +logit to compute and -logit to reuse; row T-1 is fixed.
    """
    logits_TB = torch.where(plan.to_tensor(), logit, -logit)
    logits_TB[-1] = FIXED_LOGIT
    return logits_TB


def threshold_for(scores_TB: Tensor, macs: Macs, speedup: float) -> float:
    """Return the threshold tau at which the plan's speed is nearest.

    The lowest scores are reused first.
    """
    scores = scores_TB[:-1].detach().cpu().double()
    costs = torch.tensor(macs.branches, dtype=torch.float64).expand_as(scores)
    scores, order = scores.flatten().sort()
    spent = costs.flatten()[order].cumsum(0)
    wanted = reusable_fraction(len(scores_TB), macs, speedup) * spent[-1]
    # A cut lies between two scores, before the first of them, or behind the last.
    cuts = torch.cat([scores[:1] / 2, (scores[1:] + scores[:-1]) / 2, (scores[-1:] + 1) / 2])
    missed = (torch.cat([spent.new_zeros(1), spent]) - wanted).abs()
    missed[1:-1][scores.diff() < _TIE] = torch.inf
    return float(cuts[missed.argmin()])
