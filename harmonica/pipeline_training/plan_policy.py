"""Run calls of a transformer under a fixed plan, also with derivatives.

The derivatives are in the forecast weights.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from harmonica.core.cache import BranchCache, Reuse
from harmonica.core.plan import Forecast, Plan
from harmonica.execution.offloading import ActivationOffloading
from harmonica.integrations.recorded.transformer_step import TransformerStep
from harmonica.integrations.recorded.unit_store import OF_OUTPUT, UnitStore
from harmonica.integrations.recorded.view import RecordedTransformer
from harmonica.pipeline_training.policies import Policy, detached
from harmonica.training.plans.fitted_weights import OUTPUT, Unknown
from harmonica.training.plans.forecast_sketch import ProbedCache
from harmonica.training.plans.step_sketch import ChangesCache, StepHandles, handles_of, with_gradient


class PlanPolicy(Policy):
    """Each call follows a plan, and computes all where it has nothing to reuse."""

    def __init__(self, plan: Plan, *, recompute: bool = False) -> None:
        """Begin.

        Args:
            recompute: backward computes branches again, in place of keeping what they need.
        """
        self.plan, self._recompute = plan, recompute
        self.fixed: set[int] = set()
        """Steps at which a call had nothing to reuse."""

    def new_kept(self, view: RecordedTransformer, reuse: Reuse) -> UnitStore:
        return view.new_kept(reuse, self.plan.forecast, self.plan.correction)

    @torch.no_grad()
    def compute(self, step: TransformerStep) -> Any:
        return self._planned(step)

    def _planned(self, step: TransformerStep) -> Any:
        if not len(step.kept):
            self.fixed.add(step.i)
            return step.full(recompute=self._recompute)
        return step.planned(self.plan.compute[step.i], recompute=self._recompute)


class ProbedPolicy(PlanPolicy):
    """Calls that are differentiable in every forecast weight of every row."""

    def __init__(self, plan: Plan, *, recompute: bool = False) -> None:
        super().__init__(plan, recompute=recompute)
        self._caches: list[tuple[int, ProbedCache]] = []

    def new_kept(self, view: RecordedTransformer, reuse: Reuse) -> UnitStore:
        kept = view.new_kept(reuse, self.plan.forecast, self.plan.correction)

        def make(unit: str, count: int, learned: Forecast | None) -> BranchCache:
            cache = ProbedCache(count, learned)
            self._caches.append((kept.branch_of.get(unit, OUTPUT), cache))
            return cache

        return _HandedValues(kept, make)

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
    """Calls in full, differentiable in what reuse and correction would change."""

    def __init__(
        self,
        reach: int,
        *,
        corrects: bool,
        recompute: bool = False,
        offloading: ActivationOffloading | None = None,
    ) -> None:
        """Begin.

        Args:
            reach: the largest distance of a step that another one is reused from.
            corrects: measure what the outputs of earlier steps would change, too.
            recompute: backward computes branches again, in place of keeping what they need.
            offloading: keeps the values of earlier steps.
        """
        self.reach, self._corrects, self._recompute = reach, corrects, recompute
        self._offloading = offloading
        self.fixed: set[int] = set()
        """Steps at which a call had nothing to reuse."""
        self._caches: list[ChangesCache] = []
        self._outputs: list[ChangesCache] = []

    def new_kept(self, view: RecordedTransformer, reuse: Reuse) -> UnitStore:
        def make(unit: str, count: int, learned: Forecast | None) -> BranchCache:
            caches = self._outputs if unit == OF_OUTPUT else self._caches
            caches.append(cache := ChangesCache(count, self.reach, self._offloading))
            return cache

        return _HandedValues(view.new_kept(reuse), make)

    def compute(self, step: TransformerStep) -> Any:
        if not len(step.kept):
            self.fixed.add(step.i)
            return self._corrected(step, step.full(recompute=self._recompute))
        output = step.full(recompute=self._recompute)
        # The call once more, all of it reused from itself: its branches do not respond to each other.
        inputs = detached((step.args, step.kwargs))
        same = replace(step, args=inputs[0], kwargs=inputs[1]).planned((False,) * len(step.view.branches))
        return self._corrected(step, _pytree.tree_map(with_gradient, output, same))

    def _corrected(self, step: TransformerStep, output: Any) -> Any:
        if not self._corrects:
            return output
        return _pytree.tree_map(with_gradient, output, step.kept.corrected(step.i, detached(output)))

    def handles(self) -> StepHandles:
        """Return the zeros of each step: of all units, and of the calls' outputs."""
        return handles_of(self._caches, self._outputs)


class _HandedValues(UnitStore):
    """Kept values in caches that a policy makes, and so keeps."""

    def __init__(self, like: UnitStore, make: Callable[[str, int, Forecast | None], BranchCache]) -> None:
        """Take over the branches of other kept values.

        Args:
            make: takes a unit, the number of its tensors and their forecast weights.
        """
        super().__init__(like.branch_of, like.reuse, like.learned, like.correction)
        self._make = make

    def new_cache(self, unit: str, count: int) -> BranchCache:
        return self._make(unit, count, self.forecast_of(unit, count))
