"""Learn which whole steps to reuse, together with their forecasts.

The search looks for the set of steps whose least change of the image, with the best forecasts, is smallest
(`harmonica.training.plans.step_form`). It may have runs of reused steps.

Ours; `tests/benchmarks/RESULTS.md` has what it is worth.
"""

import math
from collections.abc import Callable, Collection, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.plan_builders import (
    even_plan,
    even_steps,
    logits_of,
    speedup_of,
    steps_for,
    stepwise_plan,
    with_part,
)
from harmonica.core.router import Router
from harmonica.models.base import Macs
from harmonica.training.backend import TrajectoryBackend
from harmonica.training.config import OF_STEPS, TrainingConfig
from harmonica.training.plans.selection import PlanSelector
from harmonica.training.plans.step_form import StepForm
from harmonica.validation.settings import SettingError

_ALL = 1000
"""The largest number of sets that are all tried; with more, steps are moved at random."""
_ROUNDS, _STARTS = 3000, 4
_MOVES = (-3, -2, -1, 1, 2, 3)


def initial_router(backend: TrajectoryBackend, config: TrainingConfig, seed: int) -> Router:
    """Return the router that training starts from, or that a measured start replaces."""
    sampler = backend.sampler
    shape = (sampler.num_steps, len(sampler.model.branches))
    if config.initial == "normal":
        return Router.normal(*shape, seed)
    if config.initial == "alternate":
        return Router.alternating(*shape, config.initial_logit)
    if config.initial in OF_STEPS and not config.target_psnr:  # until it is measured
        macs = sampler.model.macs()
        speedup = config.target_speedup or speedup_of(config.target_cur, macs)
        plan = even_plan(sampler.num_steps, macs, speedup, is_flow_matching=backend.is_flow_matching)
        return Router.from_logits(logits_of(plan, config.initial_logit))
    return Router(*shape, config.initial_logit)


class StepSearch(StepForm):
    """The search for steps of least change."""

    def plans(
        self,
        macs: Macs,
        speedup: float,
        fixed: Collection[int] = (),
        ridge: float | None = None,
        number: int = 1,
    ) -> list[Plan]:
        """Return the best plans found for a speed, best first.

        The costliest step of each is reused in part.

        Args:
            fixed: steps that are computed in any case.
            ridge: replaces the search's own.
            number: how many plans at most.
        """
        count, fraction = steps_for(self.num_steps, macs, speedup)
        found = []
        for steps in self.best_sets(count, number, fixed, ridge):
            plan = stepwise_plan(self.num_steps, len(macs.branches), steps)
            if fraction != 1 and steps:
                left_out = {
                    step: self.cost([other for other in steps if other != step], ridge) for step in steps
                }
                plan = with_part(plan, min(left_out, key=lambda step: left_out[step]), fraction, macs)
            found.append(plan)
        return found

    def best(self, count: int, fixed: Collection[int] = (), ridge: float | None = None) -> list[int]:
        """Return the best `count` steps found, ascending; see `best_sets`."""
        return self.best_sets(count, 1, fixed, ridge)[0]

    def best_sets(
        self, count: int, number: int, fixed: Collection[int] = (), ridge: float | None = None
    ) -> list[list[int]]:
        """Return the best sets of `count` steps found, best first, each ascending.

        They are the best of all where these are few, as at T = 10.

        Args:
            number: how many sets at most.
            fixed: steps that are computed in any case.
            ridge: replaces the search's own.
        """
        ridge = self.ridge if ridge is None else ridge
        even = even_steps(self.num_steps, count, fixed)
        free = [step for step in range(self.num_steps - 1) if step not in fixed]
        known: dict[frozenset[int], float] = {}
        if math.comb(len(free), len(even)) <= _ALL:
            known = {frozenset(steps): self.cost(steps, ridge) for steps in combinations(free, len(even))}
        else:
            for start in range(_STARTS):
                self._search(even, np.random.default_rng(start), fixed, ridge, known)
        # Of equal ones even steps come first, as where all cost nothing.
        ranked = sorted(known, key=lambda steps: (known[steps], steps != frozenset(even), sorted(steps)))
        finite = [steps for steps in ranked if np.isfinite(known[steps])]
        return [sorted(steps) for steps in (finite or ranked)[:number]]

    def _search(
        self,
        start: Sequence[int],
        generator: np.random.Generator,
        fixed: Collection[int],
        ridge: float,
        known: dict[frozenset[int], float],
    ) -> None:
        """Run simulated annealing over moves of one step.

        `known` gets the costs of the sets on its way. It is deterministic for a given form.
        """

        def cost_of(steps: list[int]) -> float:
            key = frozenset(steps)
            if key not in known:
                known[key] = self.cost(key, ridge)
            return known[key]

        chosen = list(start)
        cost = cost_of(chosen)
        for turn in range(_ROUNDS if chosen else 0):
            heat = 0.2 * (1 - turn / _ROUNDS)
            place = int(generator.integers(len(chosen)))
            moved = chosen[place] + _MOVES[generator.integers(len(_MOVES))]
            others = chosen[:place] + chosen[place + 1 :]
            if not 0 <= moved < self.num_steps - 1 or moved in fixed or moved in others:
                continue
            new = cost_of([*others, moved])
            # Branches that are silent, as an untrained model's are, cost nothing.
            if new < cost or new == 0 or generator.random() < (cost / new) ** (1 / max(heat, 1e-9)):
                chosen, cost = [*others, moved], new


def most_steps(num_steps: int) -> int:
    """Return the most steps that are reused for a wanted quality."""
    return num_steps * 4 // 5


class FoundPlan(NamedTuple):
    """The plan that a wanted quality has led to."""

    plan: Plan
    steps: int
    """The number of its steps that are reused."""
    psnr: float
    """The nearness of its images to the full sampler's, in dB."""


def fastest_plan(
    search: StepSearch,
    backend: TrajectoryBackend,
    batches: Sequence[Any],
    psnr: float,
    reuse: Reuse,
    average: Callable[[Tensor], None],
) -> FoundPlan:
    """Return the plan with the most steps reused that reaches a PSNR.

    Args:
        psnr: in dB, of values in [-1, 1].

    Raises:
        SettingError: no plan that reuses a step reaches it; on all workers alike.
    """
    sampler, fixed = backend.sampler, backend.fixed_steps
    num_steps, num_branches = sampler.num_steps, len(sampler.model.branches)
    plans = {
        str(count): stepwise_plan(num_steps, num_branches, search.best(count, fixed))
        for count in range(1, 1 + most_steps(num_steps))
    }
    measured = PlanSelector(plans, reuse)
    measured.observe(backend, batches, average, as_pictures=True)
    found = {name: measured.psnr(name) for name in plans}
    near = [name for name in plans if found[name] >= psnr]
    if not near:
        nearest = math.floor(10 * max(found.values())) / 10  # rounded down, since it is to be given
        reason = f"is {psnr:g}: the nearest plan that reuses a step is at {nearest:g} dB here, give no more"
        raise SettingError(f"train.target_psnr {reason}", "train.target_psnr", reason)
    plan = plans[near[-1]]
    return FoundPlan(plan, sum(not all(computed) for computed in plan.compute), found[near[-1]])
