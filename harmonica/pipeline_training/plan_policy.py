"""Run calls of a transformer under a fixed plan, also with derivatives.

The derivatives are in the forecast weights.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from harmonica.core.cache import BranchCache, Reuse
from harmonica.core.plan import Plan
from harmonica.integrations.recorded.kept_values import KeptValues
from harmonica.integrations.recorded.view import RecordedTransformer
from harmonica.pipeline_training.policies import Policy, TransformerStep, detached
from harmonica.training.plans.forecast_sketch import ProbedCache, Unknown
from harmonica.training.plans.step_sketch import ChangesCache


class PlanPolicy(Policy):
    """Each call follows a plan, and computes all where it has nothing to reuse."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.fixed: set[int] = set()
        """Steps at which a call had nothing to reuse."""

    def new_kept(self, view: RecordedTransformer, reuse: Reuse) -> KeptValues:
        return view.new_kept(reuse, self.plan.forecast)

    @torch.no_grad()
    def compute(self, step: TransformerStep) -> Any:
        return self._planned(step)

    def _planned(self, step: TransformerStep) -> Any:
        if not len(step.kept):
            self.fixed.add(step.i)
            return step.full()
        return step.planned(self.plan.compute[step.i])


class ProbedPolicy(PlanPolicy):
    """Calls that are differentiable in every forecast weight of every row."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._caches: list[tuple[int, ProbedCache]] = []

    def new_kept(self, view: RecordedTransformer, reuse: Reuse) -> KeptValues:
        return _ProbedValues(view.new_kept(reuse, self.plan.forecast), self._caches)

    def compute(self, step: TransformerStep) -> Any:
        return self._planned(step)

    def handles(self) -> dict[Unknown, list[Tensor]]:
        """Return the zeros (M,) added for each weight, of all calls and tensors."""
        found: dict[Unknown, list[Tensor]] = {}
        for branch, cache in self._caches:
            for (step, _, k), handle_M in cache.handles.items():
                found.setdefault((step, branch, k), []).append(handle_M)
        return found


class StepSketchPolicy(Policy):
    """Calls in full, each differentiable in what its reuse would change."""

    def __init__(self, reach: int) -> None:
        """Begin.

        Args:
            reach: the largest distance of a step that another one is reused from.
        """
        self.reach = reach
        self.fixed: set[int] = set()
        """Steps at which a call had nothing to reuse."""
        self._caches: list[ChangesCache] = []

    def new_kept(self, view: RecordedTransformer, reuse: Reuse) -> KeptValues:
        return _ChangesValues(view.new_kept(reuse), self._caches, self.reach)

    def compute(self, step: TransformerStep) -> Any:
        if not len(step.kept):
            self.fixed.add(step.i)
            return step.full()
        output = step.full()
        # The call once more, all of it reused from itself: its branches do not respond to each other.
        inputs = detached((step.args, step.kwargs))
        same = replace(step, args=inputs[0], kwargs=inputs[1]).planned((False,) * len(step.view.branches))
        return _pytree.tree_map(_with_gradient, output, same)

    def handles(self) -> dict[int, list[Tensor]]:
        """Return the zeros (M, D) of each step, of all calls and units."""
        found: dict[int, list[Tensor]] = {}
        for cache in self._caches:
            for i, handle_MD in cache.handles.items():
                found.setdefault(i, []).append(handle_MD)
        return found


def _with_gradient(output: Any, same: Any) -> Any:
    """Return an output with the gradient of an equal one besides its own."""
    return output + (same - same.detach()) if isinstance(output, Tensor) else output


class _ChangesValues(KeptValues):
    """Kept values in caches of full steps, which it hands to the policy."""

    def __init__(self, like: KeptValues, caches: list[ChangesCache], reach: int) -> None:
        super().__init__(like.branch_of, like.reuse, like.learned)
        self._changes, self._reach = caches, reach

    def new_cache(self, unit: str, count: int) -> BranchCache:
        cache = ChangesCache(count, self._reach)
        self._changes.append(cache)
        return cache


class _ProbedValues(KeptValues):
    """Kept values in probed caches, which it hands to the policy."""

    def __init__(self, like: KeptValues, caches: list[tuple[int, ProbedCache]]) -> None:
        super().__init__(like.branch_of, like.reuse, like.learned)
        self._probed = caches

    def new_cache(self, unit: str, count: int) -> BranchCache:
        cache = ProbedCache(count, self.forecast_of(unit, count))
        self._probed.append((self.branch_of[unit], cache))
        return cache
