"""The phases that choose the start: it is measured, or even steps are refined."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from harmonica.core.plan import Plan
from harmonica.training.config import MEASURED, TRIED, TrainingConfig
from harmonica.training.context import TrainingContext
from harmonica.training.phase import Phase, assumed_speedup
from harmonica.training.plans.builders import even_plan, logits_of, speedup_of
from harmonica.training.plans.refine import PlanRefiner
from harmonica.training.plans.search import StepSearch, fastest_plan

_SETS = 5
"""The number of sets that a round tries, about; it grows with the logarithm of the number of moves."""


class StartPhase(Phase):
    """Search for the whole steps whose reuse changes the image least."""

    name, state_key = "start", "search"

    def __init__(self, context: TrainingContext) -> None:
        super().__init__(context)
        self.search = StepSearch(context.sampler.num_steps)

    @staticmethod
    def costs(config: TrainingConfig, num_steps: int, *, from_start: bool = False) -> list[float]:
        """Count the cost of `training.plans.search.step_effects`.

        It reuses steps alone, and after the one two before.
        """
        last = num_steps - 1
        # The full steps: those behind the reused ones, or all others.
        alone, after = sum(range(last)), sum(range(last - 2))
        if from_start:
            alone, after = last * last, max(0, last - 2) * (num_steps - 2)
        costs = [1 + (alone + after) / num_steps] * config.measured_trajectories
        if costs and config.target_psnr:  # the plan that is near enough is looked for with the last batch
            costs[-1] += 1 + sum(1 - count / num_steps for count in range(1, num_steps // 2 + 1))
        return costs

    def step(self, batch: Any, average: Callable[[Tensor], None]) -> dict[str, float]:
        context, batches = self.context, batch.split(self.config.micro_batch_size)
        with context.sdt.stopwatch.measure("start"):
            return self.search.observe(context.backend, batches, self.config.sdt.reuse, average)

    def finish(self, batch: Any, average: Callable[[Tensor], None]) -> dict[str, float]:
        """Find the speed for a wanted quality, and start the router at the best steps."""
        context, metrics = self.context, dict[str, float]()
        if self.config.target_psnr:
            batches, reuse = batch.split(self.config.micro_batch_size), self.config.sdt.reuse
            psnr = self.config.target_psnr
            plan, found = fastest_plan(self.search, context.backend, batches, psnr, reuse, average)
            context.target.set_speedup(plan.ideal_speedup(context.sampler.model.macs()))
            metrics = {"target_speedup": context.target.speedup, "psnr": found}
        self._set_starts()
        return metrics

    def skip(self, other: "StartPhase") -> None:
        """Take over what another training, for another speed, has measured."""
        self.search.load_state(other.search.state())
        self.done = self.trajectories
        self._set_starts()

    def _set_starts(self) -> None:
        context, fixed = self.context, self.context.backend.fixed_steps
        num_steps, macs = context.sampler.num_steps, context.sampler.model.macs()
        speedup = context.target.speedup or speedup_of(self.config.target_cur, macs)
        plans = {
            "even": even_plan(num_steps, macs, speedup, fixed),
            "measured": self.search.plan(macs, speedup, fixed),
        }
        logit, device = self.config.initial_logit, context.device
        context.starts = {name: logits_of(plan, logit).to(device) for name, plan in plans.items()}
        context.set_router(context.starts["measured"])

    def state(self) -> Tensor:
        return self.search.state()

    def load_state(self, state: Tensor) -> None:
        self.search.load_state(state)


class RefinePhase(Phase):
    """Rounds of moves of the start's computed steps (`training.plans.refine`)."""

    name, state_key = "refine", "refine"
    refiner: PlanRefiner | None = None
    """The present round, once the phase has begun."""

    @staticmethod
    def costs(config: TrainingConfig, num_steps: int, *, from_start: bool = False) -> list[float]:
        """Count full images, the plan, and the rest of it for each move.

        The plans that are tried come on top.
        """
        speedup = assumed_speedup(config)
        computed = 1 / speedup
        moves = 2 * num_steps * min(computed, 1 - computed)
        each = 1.0 if from_start else 0.5  # what a move runs of the plan
        round_costs = [1 + computed * (1 + each * moves)] * MEASURED + [1 + computed * _SETS] * TRIED
        return round_costs * config.rounds_of_refinement

    def begin(self) -> None:
        """Begin a round around the router's present plan."""
        context = self.context
        self.refiner = PlanRefiner(context.plan, self.config.sdt.reuse, context.backend.fixed_steps)

    def step(self, batch: Any, average: Callable[[Tensor], None]) -> dict[str, float]:
        assert self.refiner is not None, "begin() makes it"
        context, batches = self.context, batch.split(self.config.micro_batch_size)
        place = self.done % (MEASURED + TRIED)
        with context.sdt.stopwatch.measure("refine"):
            if place < MEASURED:
                return self.refiner.measure(context.backend, batches, average)
            metrics = self.refiner.try_moves(context.backend, batches, average)
        if place == MEASURED + TRIED - 1:
            metrics["refine.gain_db"] = self.refiner.gain_db
            self._end_round(self.refiner.best)
        return metrics

    def _end_round(self, plan: Plan) -> None:
        """Let the router start from the best plan of the round, and go on from there."""
        context = self.context
        context.starts["refined"] = logits_of(plan, self.config.initial_logit).to(context.device)
        context.set_router(context.starts["refined"])
        self.begin()

    def state(self) -> dict[str, Any] | None:
        return self.refiner.state() if self.refiner else None

    def load_state(self, state: dict[str, Any]) -> None:
        plan = Plan(tuple(tuple(row) for row in state["plan"].tolist()))
        self.refiner = PlanRefiner(plan, self.config.sdt.reuse, self.context.backend.fixed_steps)
        self.refiner.load_state(state)
