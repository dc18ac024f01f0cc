"""Segments: neighbouring branches that are reused and forecast as one.

A plan of whole steps reuses all branches of a step together, so one value can stand for all of them: what
they add to the hidden state in all, each behind its gate, the hidden state after the last one minus that
before the first. A cache then keeps a value a segment in place of one a branch, a computed step is run like
that of an uncached model, and training keeps as much less. Forecasts of a segment have one weight for all of
its branches, and take the gates of the steps that they are made of.

Where uncached sub-layers lie between branches, a segment ends. `tests/benchmarks/RESULTS.md` has what
segments are worth. Shapes: N rows, L tokens, D width, T steps, B branches, S segments.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from harmonica.core.plan import Plan
from harmonica.models.base import Branch, BranchedTransformer, run_all


class Segment(Branch):
    """Neighbouring branches seen as one, which is merged without a gate."""

    kind = "segment"

    def __init__(self, branches: Sequence[Branch]) -> None:
        """See branches as one; no uncached sub-layers lie between them."""
        *others, last = branches
        self.name, self.macs = f"{branches[0].name} to {last.name}", sum(each.macs for each in branches)
        # What always runs after the last one runs after the segment, whether that is computed or reused.
        self.parts, self._always = (*others, last.alone), last.always

    def inputs(self, conditioning: Any) -> tuple[Any, ...]:
        return (conditioning,)

    def run(self, hidden_NLD: Tensor, *inputs: Any) -> Tensor:
        return run_all(self.parts, hidden_NLD, *inputs) - hidden_NLD

    @property
    def always(self) -> Sequence[Branch]:
        return self._always


def segment_starts(model: BranchedTransformer, plan: Plan | None = None) -> tuple[int, ...]:
    """Return the first branch of each segment.

    Segments are as long as the plan and the model's uncached sub-layers allow.

    Args:
        plan: its segments, whose branches it computes at the same steps; None is of whole steps.
    """
    columns = list(zip(*plan.compute, strict=True)) if plan else [()] * len(model.branches)
    starts = [0]
    for branch in range(1, len(columns)):
        if columns[branch] != columns[branch - 1] or model.branches[branch - 1].has_post_branch:
            starts.append(branch)
    return tuple(starts)


def with_segments(plan: Plan, model: BranchedTransformer) -> Plan:
    """Return the plan with segments, as long as they may be."""
    return replace(plan, segments=segment_starts(model, plan))


def segments_of(model: BranchedTransformer, starts: Sequence[int]) -> list[Segment]:
    """Return the segments that begin at these branches."""
    branches = tuple(model.branches)
    return [Segment(branches[first:end]) for first, end in pairwise((*starts, len(branches)))]


def units_of(model: BranchedTransformer, plan: Plan) -> tuple[Sequence[Branch], Plan]:
    """Return what a plan computes or reuses as one, and the plan in terms of these.

    They are the model's branches, or the plan's segments.
    """
    if plan.segments is None:
        return model.branches, plan
    return segments_of(model, plan.segments), plan.by_segment()
