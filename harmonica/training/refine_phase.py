"""The phase that refines the start, before the router is trained."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from harmonica.core.plan import Plan
from harmonica.training.config import MEASURED, TRIED, TrainingConfig
from harmonica.training.phase import Phase, assumed_speedup
from harmonica.training.plans.builders import logits_of
from harmonica.training.plans.refine import PlanRefiner

_SETS = 5
"""The number of sets that a round tries, about; it grows with the logarithm of the number of moves."""


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
