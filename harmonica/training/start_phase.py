"""The phase that learns from the image's gradients which whole steps to reuse."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from harmonica.core.plan import Plan
from harmonica.core.plan_builders import even_plan, logits_of, speedup_of
from harmonica.training.config import TrainingConfig
from harmonica.training.context import TrainingContext
from harmonica.training.memory_savings import advised
from harmonica.training.phase import Phase
from harmonica.training.plans.search import StepSearch, fastest_plan, most_steps
from harmonica.training.plans.step_form import LINEAR, SEARCH_RIDGES

NEAREST = 4
"""The largest number of sets of steps that the search leaves to the choice, best first."""
_BACKWARD = 1.2
"""The measured cost of a backward and its products with earlier values; those take a sixth of it."""


class StartPhase(Phase):
    """Search for the whole steps whose reuse changes the image least.

    Each set counts with its best forecasts.
    """

    name, state_key = "start", "search"

    def __init__(self, context: TrainingContext) -> None:
        super().__init__(context)
        config = context.config
        self.ridges = SEARCH_RIDGES if config.forecast.trajectories else (LINEAR,)
        """The ridges of the starts, the main one first; forecasts that are not fitted will stay linear."""
        order, corrections = (1, 0) if config.sdt.reuse == "forecast" else (0, 0)
        if config.forecast.trajectories:
            order, corrections = config.forecast.order, config.forecast.corrections
        self.search = StepSearch(
            context.sampler.num_steps,
            order,
            self.ridges[0],
            corrections=corrections,
            segments=context.has_segments,
        )
        context.search = self.search

    @staticmethod
    def costs(config: TrainingConfig, num_steps: int, *, from_start: bool = False) -> list[float]:
        """Count a full trajectory, and a backward with its products for each probe.

        A forward comes before each backward where branches are computed again.
        """
        backward = _BACKWARD + config.forecast.activation_checkpointing
        costs = [1 + backward * config.forecast.probes] * config.start_trajectories
        if costs and config.target_psnr:  # the plan that is near enough is looked for with the last batch
            costs[-1] += 1 + sum(1 - count / num_steps for count in range(1, 1 + most_steps(num_steps)))
        return costs

    def step(self, batch: Any, average: Callable[[Tensor], None]) -> dict[str, float]:
        context, config = self.context, self.config
        batches = batch.split(config.micro_batch_size or config.forecast.rows_at_once)
        with context.sdt.stopwatch.measure("start"), advised(*context.cures):
            return self.search.observe(
                context.backend,
                batches,
                config.forecast.probes,
                average,
                savings=config.forecast.savings,
            )

    def finish(self, batch: Any, average: Callable[[Tensor], None]) -> dict[str, float]:
        """Find the speed for a wanted quality, and start the router at the best steps.

        Raises:
            SettingError: no plan has the quality; on all workers alike.
        """
        context, metrics = self.context, dict[str, float]()
        if self.config.target_psnr:
            batches, reuse = batch.split(self.config.micro_batch_size), self.config.sdt.reuse
            psnr = self.config.target_psnr
            found = fastest_plan(self.search, context.backend, batches, psnr, reuse, average)
            speedup = found.plan.ideal_speedup(context.sampler.model.macs())
            context.target.set_speedup(speedup)
            context.found = {"reused_steps": found.steps, "psnr": found.psnr, "macs_speedup": speedup}
            metrics = {"target_speedup": speedup, "psnr": found.psnr}
        self._set_starts()
        return metrics

    def skip(self, other: "StartPhase") -> None:
        """Take over what another training, for another speed, has measured."""
        self.search.load_state(other.search.state())
        self.done = self.trajectories
        self._set_starts()

    def _set_starts(self) -> None:
        """Set the router to the best steps.

        The next best, and what other ridges lead to, are kept for the choice.
        """
        context, backend = self.context, self.context.backend
        fixed, is_flow_matching = backend.fixed_steps, backend.is_flow_matching
        num_steps, macs = context.sampler.num_steps, context.sampler.model.macs()
        speedup = context.target.speedup or speedup_of(self.config.target_cur, macs)
        plans: dict[str, Plan] = {}
        for ridge in self.ridges:
            number = NEAREST if ridge == self.ridges[0] else 1
            for place, plan in enumerate(self.search.plans(macs, speedup, fixed, ridge, number)):
                if plan not in plans.values():
                    plans[_name(ridge, place) if plans else "measured"] = plan
        plans["even"] = even_plan(num_steps, macs, speedup, fixed, is_flow_matching=is_flow_matching)
        logit, device = self.config.initial_logit, context.device
        context.starts = {name: logits_of(plan, logit).to(device) for name, plan in plans.items()}
        context.set_router(context.starts["measured"])

    def state(self) -> Tensor:
        return self.search.state()

    def load_state(self, state: Tensor) -> None:
        self.search.load_state(state)


def _name(ridge: float, place: int) -> str:
    if place:
        return f"measured_no{place + 1}"
    return "measured_linear" if ridge == LINEAR else f"measured_{ridge:g}"
