"""The measured start: the whole steps whose joint reuse changes the image least.

The change of the final latents that reusing step i makes is a vector; the changes of several steps nearly add
up, and their directions matter: errors of one kind pile up, others cancel. So the squared change of a set of
steps is close to a quadratic form, measured with 2(T-1) runs that share what lies before with a full one, and
the best set for a speed is found by search. No two steps running are reused: that costs ten times more.

Ours; `tests/benchmarks/RESULTS.md` has what it is worth. Shapes: N images, T steps, E = 2(T-1) effects.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmonica.core.cache import BranchCache, Reuse
from harmonica.core.plan import Plan
from harmonica.core.router import Router
from harmonica.core.trajectory import planned_step
from harmonica.data.batch import Batch
from harmonica.models.base import Macs
from harmonica.samplers import Sampler, State
from harmonica.training.backend import TrajectoryBackend
from harmonica.training.config import OF_STEPS, TrainingConfig
from harmonica.training.plans.builders import (
    even_plan,
    even_steps,
    logits_of,
    speedup_of,
    steps_for,
    stepwise_plan,
    with_part,
)
from harmonica.training.plans.selection import PlanSelector

_SMALLEST_EFFECT = 1e-12
_ROUNDS, _STARTS = 4000, 4
_MOVES = (-3, -2, -1, 1, 2, 3)


def initial_router(sampler: Sampler, config: TrainingConfig, seed: int) -> Router:
    """Return the router that training starts from, or that a measured start replaces."""
    shape = (sampler.num_steps, len(sampler.model.branches))
    if config.initial == "normal":
        return Router.normal(*shape, seed)
    if config.initial == "alternate":
        return Router.alternating(*shape, config.initial_logit)
    if config.initial in OF_STEPS and not config.target_psnr:  # until it is measured
        macs = sampler.model.macs()
        speedup = config.target_speedup or speedup_of(config.target_cur, macs)
        plan = even_plan(sampler.num_steps, macs, speedup)
        return Router.from_logits(logits_of(plan, config.initial_logit))
    return Router(*shape, config.initial_logit)


def step_effects(sampler: Sampler, batch: Batch, reuse: Reuse) -> Tensor:
    """Return the changes of the final latents (E, N, CHW) by reuse of step i."""
    last, branches = sampler.num_steps - 1, len(sampler.model.branches)
    everything, nothing = (True,) * branches, (False,) * branches
    state, cache = batch.start(sampler), BranchCache(branches, reuse)
    before: dict[int, tuple[State, BranchCache]] = {}
    for i in range(last, -1, -1):
        before[i] = state, cache.copy()
        state, _ = planned_step(sampler, i, state, everything, cache)
    full_NX = sampler.finish(state).flatten(1)

    def change(i: int, state: State, cache: BranchCache) -> Tensor:
        """Return the change of the final latents with steps i ... 0 computed in full."""
        for step in range(i, -1, -1):
            state, _ = planned_step(sampler, step, state, everything, cache)
        return sampler.finish(state).flatten(1) - full_NX

    alone: list[Tensor] = []
    after = dict[int, Tensor]()
    for i in range(last):
        state, cache = before[i][0], before[i][1].copy()
        state, _ = planned_step(sampler, i, state, nothing, cache)
        if i >= 1:
            state, _ = planned_step(sampler, i - 1, state, everything, cache)
        alone.append(change(i - 2, state, cache.copy()))
        if i >= 2:
            state, _ = planned_step(sampler, i - 2, state, nothing, cache)
            after[i - 2] = change(i - 3, state, cache)
    return stacked_effects(alone, after)


def stacked_effects(alone: Sequence[Tensor], after: Mapping[int, Tensor]) -> Tensor:
    """Return the effects (E, N, X) from the changes of the final latents (N, X).

    Args:
        alone: of step i reused.
        after: of steps i and i + 2 reused, where there is a step i + 2 to reuse.
    """
    places = range(len(alone))
    return torch.stack([*alone, *(after[i] - alone[i + 2] if i in after else alone[i] for i in places)])


class StepSearch:
    """The quadratic form of image change, and the search for steps of least change."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        count = 2 * (num_steps - 1)
        self.gram_EE = torch.zeros(count, count, dtype=torch.float64)

    @torch.no_grad()
    def observe(
        self,
        backend: TrajectoryBackend,
        batches: Sequence[Any],
        reuse: Reuse,
        average: Callable[[Tensor], None],
    ) -> dict[str, float]:
        """Measure one batch, given in parts, and return the metrics to log.

        Each image is weighted by the inverse of the sum of its single effects, so that no few images decide.
        """
        gram_EE = torch.zeros_like(self.gram_EE, device=backend.device)
        loss = torch.zeros(1, dtype=torch.float64, device=gram_EE.device)
        count = sum(map(len, batches))
        for batch in batches:
            effects_ENX = backend.step_effects(batch, reuse).double()
            scale_N = effects_ENX[: self.num_steps - 1].square().sum((0, 2)).clamp_min(_SMALLEST_EFFECT)
            gram_EE += torch.einsum("inx,jnx,n->ij", effects_ENX, effects_ENX, 1 / scale_N) / count
            loss += effects_ENX.square().mean() * len(batch) / count
        average(gram_EE)
        average(loss)
        self.gram_EE += gram_EE.cpu()
        return {"loss": float(loss)}

    def cost(self, steps: Iterable[int]) -> float:
        """Return the squared change by reuse of these steps.

        It is relative to the sum of all single ones.
        """
        chosen = set(steps)
        places = [i + (self.num_steps - 1 if i + 2 in chosen else 0) for i in chosen]
        return max(0.0, float(self.gram_EE[places][:, places].sum()))  # below 0 by rounding

    def plan(self, macs: Macs, speedup: float, fixed: Collection[int] = ()) -> Plan:
        """Return the best plan found for a speed; its costliest step is reused in part.

        Args:
            fixed: steps that are computed in any case.
        """
        count, fraction = steps_for(self.num_steps, macs, speedup)
        steps = self.best(count, fixed)
        plan = stepwise_plan(self.num_steps, len(macs.branches), steps)
        if fraction == 1:
            return plan
        left_out = {step: self.cost([other for other in steps if other != step]) for step in steps}
        return with_part(plan, min(left_out, key=lambda step: left_out[step]), fraction, macs)

    def best(self, count: int, fixed: Collection[int] = ()) -> list[int]:
        """Return the best `count` steps, ascending.

        Where some must be consecutive, they are evenly spread.

        Args:
            fixed: steps that are computed in any case.
        """
        even = even_steps(self.num_steps, count, fixed)
        if any(i + 1 in even for i in even):
            return even
        found = [self._search(even, np.random.default_rng(start), fixed) for start in range(_STARTS)]
        return sorted(min([even, *found], key=self.cost))

    def _search(
        self, start: Sequence[int], generator: np.random.Generator, fixed: Collection[int]
    ) -> list[int]:
        """Run simulated annealing over moves of one step.

        It is deterministic for a given form.
        """
        best = chosen = list(start)
        best_cost = cost = self.cost(chosen)
        for turn in range(_ROUNDS):
            heat = 0.2 * (1 - turn / _ROUNDS)
            place = int(generator.integers(len(chosen)))
            moved = chosen[place] + int(generator.choice(_MOVES))
            others = chosen[:place] + chosen[place + 1 :]
            if not 0 <= moved < self.num_steps - 1 or moved in fixed:
                continue
            if {moved - 1, moved, moved + 1} & set(others):
                continue
            new = self.cost([*others, moved])
            # Branches that are silent, as an untrained model's are, cost nothing.
            if new < cost or new == 0 or generator.random() < (cost / new) ** (1 / max(heat, 1e-9)):
                chosen, cost = [*others, moved], new
            if cost < best_cost:
                best, best_cost = chosen, cost
        return best

    def state(self) -> Tensor:
        """Return the Gram matrix (E, E) for a checkpoint."""
        return self.gram_EE

    def load_state(self, state: Tensor) -> None:
        """Load what `state` returned."""
        self.gram_EE = state.cpu()


def fastest_plan(
    search: StepSearch,
    backend: TrajectoryBackend,
    batches: Sequence[Any],
    psnr: float,
    reuse: Reuse,
    average: Callable[[Tensor], None],
) -> tuple[Plan, float]:
    """Return the plan with the most steps reused that reaches a PSNR, and its PSNR.

    Args:
        psnr: in dB, of values in [-1, 1]. Where no plan reaches it, the plan reuses a single step.
    """
    sampler, fixed = backend.sampler, backend.fixed_steps
    num_steps, num_branches = sampler.num_steps, len(sampler.model.branches)
    plans = {
        str(count): stepwise_plan(num_steps, num_branches, search.best(count, fixed))
        for count in range(1, num_steps // 2 + 1)
    }
    measured = PlanSelector(plans, reuse)
    measured.observe(backend, batches, average, as_pictures=True)
    near = [name for name in plans if measured.psnr(name) >= psnr] or ["1"]
    return plans[near[-1]], measured.psnr(near[-1])
