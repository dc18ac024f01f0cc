"""The phase that compares the trained plan with those that need no training."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from harmonica.training.config import TrainingConfig
from harmonica.training.phase import Phase, assumed_speedup
from harmonica.training.plans.selection import PlanSelector
from harmonica.training.start_phase import NEAREST


class ChoicePhase(Phase):
    """Compares the trained plan with the starts, image by image, and keeps the best.

    The best plan's images are nearest to the full sampler's.
    """

    name, state_key = "choice", "choice"
    selector: PlanSelector | None = None
    """The comparison, while it is made."""

    @staticmethod
    def costs(config: TrainingConfig, num_steps: int, *, from_start: bool = False) -> list[float]:
        """Count full images, and those of all plans.

        The plans are the trained one and its starts: even steps, and those that the search has left. Other
        ridges as a rule lead to one more of these.
        """
        plans = 2 + (NEAREST + 1 if config.start_trajectories else 0)
        return [1 + plans / assumed_speedup(config)] * config.choice_trajectories

    def begin(self) -> None:
        """Take the starts, and what was trained unless it misses the target."""
        context = self.context
        plans = {name: context.target.plan_of(logits_TB) for name, logits_TB in context.starts.items()}
        # A start from before these steps were known may reuse them, and be slower than it says.
        fixed = context.backend.fixed_steps
        plans = {name: plan for name, plan in plans.items() if all(all(plan.compute[i]) for i in fixed)}
        if context.target.is_met_by(context.plan) or not plans:
            plans["trained"] = context.plan
        if context.search is not None:  # each with the forecasts that it would about be fitted
            search = context.search
            plans = {name: search.with_forecast(context.in_segments(plan)) for name, plan in plans.items()}
        self.selector = PlanSelector(plans, self.config.sdt.reuse)

    def step(self, batch: Any, average: Callable[[Tensor], None]) -> dict[str, float]:
        assert self.selector is not None, "begin() makes it"
        context = self.context
        with context.sdt.stopwatch.measure("choice"):
            return self.selector.observe(context.backend, batch.split(self.config.micro_batch_size), average)

    def finish(self, batch: Any, average: Callable[[Tensor], None]) -> dict[str, float]:
        """Set the router to the nearest plan.

        It and the next nearest are left to the fit.
        """
        assert self.selector is not None, "begin() makes it"
        context, selector = self.context, self.selector
        context.chosen, self.selector = selector.best, None
        logits = {"trained": context.router.logits()} | context.starts
        context.set_router(logits[context.chosen])
        distinct: dict[Any, str] = {}  # the trained plan may be a start's
        for name in selector.ranked:
            distinct.setdefault(selector.plans[name].compute, name)
        names = [*distinct.values()][: self.config.forecast.finalists]
        context.finalists = {name: logits[name] for name in names}
        return {}

    def state(self) -> dict[str, Tensor] | None:
        return self.selector.state() if self.selector else None

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.begin()
        assert self.selector is not None, "begin() makes it"
        self.selector.load_state(state)
