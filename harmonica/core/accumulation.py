"""Sampling without cached values: reused terms are summed when they are computed.

Neighbouring branches reused at step i add the sum of `gate_b(i) * forecast_b` to the hidden state, and each
forecast is a weighted sum of values computed at earlier steps. Plan, weights and gates are known before the
trajectory starts. So a value is added to the sum of every step that will use it as soon as it is computed,
and is then let go of. A plan of whole steps needs one sum for each reused step ahead in place of two or three
values of every branch, and such a step costs one addition.

Nothing is approximated: the terms are those of `planned_pass`, added in another order.
Shapes: N rows, L tokens, D width.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from harmonica.core.cache import BranchCache, Reuse, cache_bytes, values_kept
from harmonica.core.correction import corrected
from harmonica.core.plan import Plan
from harmonica.core.segments import units_of
from harmonica.execution.eager import Addition
from harmonica.execution.levels import runner_of
from harmonica.execution.values import Scalars
from harmonica.models.base import Branch, BranchedTransformer

Entry = tuple[int, int]
"""Step and branch. The key of a sum is its step and the first branch of its run."""


@dataclass(frozen=True, slots=True)
class Term:
    """The contribution of a computed value to a later step."""

    target: Entry
    """The sum."""
    weight: float


@dataclass(frozen=True)
class AccumulationPlan:
    """For every computed value, the sums of later steps that it is added to."""

    plan: Plan
    """In terms of what is computed or reused as one, branches or segments."""
    reuse: Reuse
    terms: Mapping[Entry, tuple[Term, ...]]
    """Terms of each computed entry that is used later."""
    ends: Mapping[Entry, int]
    """For the first entry of each run of neighbouring reused branches, its last one."""
    most_sums: int
    """The largest number of sums that exist at once."""

    @classmethod
    def of(cls, plan: Plan, reuse: Reuse, model: BranchedTransformer) -> "AccumulationPlan":
        """Return the accumulation plan for a model's branches."""
        units, rows = units_of(model, plan)
        return _accumulation_plan(rows, reuse, tuple(unit.has_post_branch for unit in units))

    def nbytes(self, model: BranchedTransformer, *, is_guided: bool) -> int:
        """Return the bytes of one image's sums, in the hidden state's precision."""
        values = self.most_sums * (1 + is_guided) * math.prod(model.value_shape)
        return values * _hidden_dtype(model).itemsize

    @property
    def lookahead(self) -> int:
        """The largest number of steps between a value and a step that uses it."""
        return max(
            (step - term.target[0] for (step, _), each in self.terms.items() for term in each), default=0
        )


def _runs(row: Sequence[bool], has_post_branch: Sequence[bool]) -> dict[int, int]:
    """Return first and last branch of each run of reused branches.

    Within a run, no uncached sub-layer lies between the branches.
    """
    runs: dict[int, int] = {}
    first = None
    for branch, is_computed in enumerate(row):
        if is_computed:
            first = None
            continue
        first = branch if first is None else first
        runs[first] = branch
        if has_post_branch[branch]:
            first = None
    return runs


def _most(terms: Mapping[Entry, Sequence[Term]]) -> int:
    """Return the largest number of sums that exist at once.

    A sum exists from the first step that adds to it to the step that uses it.
    """
    begun: dict[Entry, int] = {}
    for (source, _), each in terms.items():
        for term in each:
            begun[term.target] = max(begun.get(term.target, 0), source)
    alive = Counter(step for (i, _), first in begun.items() for step in range(i, first + 1))
    return max(alive.values(), default=0)


@lru_cache(maxsize=16)
def _accumulation_plan(plan: Plan, reuse: Reuse, has_post_branch: tuple[bool, ...]) -> AccumulationPlan:
    """Compute the sums of a plan; the last few plans are remembered.

    Args:
        has_post_branch: `has_post_branch` of what each column is of.
    """
    # A cache of unit vectors, one a step, hands out weights: what `BranchCache` says of forecasts holds here.
    unit_TT = torch.eye(plan.num_steps, dtype=torch.float64)
    cache = BranchCache(plan.num_branches, reuse, plan.forecast)
    terms: dict[Entry, list[Term]] = {}
    ends: dict[Entry, int] = {}
    for i in reversed(range(plan.num_steps)):
        runs = _runs(plan.compute[i], has_post_branch)
        ends |= {(i, first): last for first, last in runs.items()}
        for first, last in runs.items():
            for branch in range(first, last + 1):
                weights_T = cache.read(branch, i)
                for source in weights_T.nonzero().flatten().tolist():
                    terms.setdefault((source, branch), []).append(Term((i, first), float(weights_T[source])))
        for branch, is_computed in enumerate(plan.compute[i]):
            if is_computed:
                cache.write(branch, i, unit_TT[i])
    return AccumulationPlan(
        plan, reuse, {entry: tuple(each) for entry, each in terms.items()}, ends, _most(terms)
    )


def is_worth_accumulating(model: BranchedTransformer, plan: Plan, reuse: Reuse) -> bool:
    """Return whether sums take at most half of the memory that values take.

    Not for a plan of single entries, which has nearly as many sums as values, and more additions. The batch
    does not count: the last bits of an image must not depend on the batch size.
    """
    values = _values_bytes(model, plan, reuse, is_guided=False)
    return 2 * AccumulationPlan.of(plan, reuse, model).nbytes(model, is_guided=False) <= values


def kept_bytes(model: BranchedTransformer, plan: Plan, reuse: Reuse, *, is_guided: bool) -> int:
    """Return the most bytes that one image keeps between steps under a plan."""
    if is_worth_accumulating(model, plan, reuse):
        return AccumulationPlan.of(plan, reuse, model).nbytes(model, is_guided=is_guided)
    return _values_bytes(model, plan, reuse, is_guided=is_guided)


def _values_bytes(model: BranchedTransformer, plan: Plan, reuse: Reuse, *, is_guided: bool) -> int:
    """Return the bytes of one image's kept values."""
    if plan.segments is None:
        return cache_bytes(model, reuse, is_guided=is_guided, forecast_order=_order(plan))
    values = len(plan.segments) * values_kept(reuse, _order(plan)) * (1 + is_guided)
    return values * math.prod(model.value_shape) * _hidden_dtype(model).itemsize


def _hidden_dtype(model: BranchedTransformer) -> torch.dtype:
    return model.residual_dtype or torch.promote_types(model.dtype, torch.float32)


def _order(plan: Plan) -> int:
    """Return the order of a plan's forecasts."""
    return len(plan.forecast[0][0]) if plan.forecast else 1


class AccumulatedSums:
    """The sums of one batch during one trajectory under an accumulation plan."""

    def __init__(
        self,
        plan: AccumulationPlan,
        conditionings_T: Sequence[Any],
        units: Sequence[Branch] | None = None,
    ) -> None:
        """Start with no sums.

        Args:
            conditionings_T: the conditioning of every step, as `embed` returns it.
            units: what the plan has columns for, if not the model's branches.
        """
        self._units = units
        self.plan, self._conditionings_T = plan, conditionings_T
        self._sums: dict[Entry, Tensor] = {}
        self._scalars = Scalars()
        self._outputs = BranchCache(0, plan.reuse, correction=plan.plan.correction).outputs

    def planned_pass(
        self, model: BranchedTransformer, hidden_NLD: Tensor, conditioning: Any, step: int
    ) -> Tensor:
        """Run one step like `harmonica.core.passes.planned_pass`.

        Returns:
            The model's output (N, out_channels, H, W), corrected where the plan says so.
        """
        branches, row, runner = self._units or model.branches, self.plan.plan.compute[step], runner_of(model)
        for index, (branch, is_computed) in enumerate(zip(branches, row, strict=True)):
            if is_computed:
                terms = self.plan.terms.get((step, index), ())
                additions = [self._addition(term, branch, hidden_NLD) for term in terms]
                hidden_NLD = runner.compute_and_add(
                    branch, index, hidden_NLD, conditioning, additions, self._scalars
                )
            elif (step, index) in self.plan.ends:
                hidden_NLD = self._sums.pop((step, index)).add_(hidden_NLD)
                last = branches[self.plan.ends[step, index]]
                hidden_NLD = runner.run_all(last.always, hidden_NLD, conditioning)
        return corrected(model.head(hidden_NLD, conditioning), step, self._outputs, model.in_channels)

    def _addition(self, term: Term, branch: Branch, hidden_NLD: Tensor) -> Addition:
        """Return a term as what is added to its sum, in the hidden state's precision."""
        total_NLD = self._sums.get(term.target)
        if total_NLD is None:
            total_NLD = self._sums[term.target] = torch.zeros_like(hidden_NLD)
        return Addition(total_NLD, branch.gate(self._conditionings_T[term.target[0]]), term.weight)

    @property
    def nbytes(self) -> int:
        """Bytes of the sums that exist now."""
        return sum(each.nbytes for each in self._sums.values())
