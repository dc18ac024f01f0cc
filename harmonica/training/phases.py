"""The phases of a router's training, with their state, progress and cost.

A start is measured, the router is trained from it, its plan is compared with those that need no training, and
the forecasts of the best plan are fitted. A phase without trajectories is left out.

What a trajectory costs follows from the settings alone, in full samplings of its samples: T forwards with
every branch computed. A reused step counts as nothing, a backward through activations as a forward.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from harmonica.training.config import TrainingConfig
from harmonica.training.context import TrainingContext
from harmonica.training.fit_phase import ForecastPhase
from harmonica.training.loss_weights import StepWeights
from harmonica.training.phase import Phase, assumed_speedup
from harmonica.training.plans.selection import PlanSelector
from harmonica.training.progress import PhaseBudget
from harmonica.training.research import follows_plan, num_trained_in_pairs
from harmonica.training.start_phase import NEAREST, StartPhase


class RouterPhase(Phase):
    """SDT with the IEPO loss (paper Section 4): an update of every row a trajectory."""

    name, state_key = "router", "lambda"

    def __init__(self, context: TrainingContext) -> None:
        super().__init__(context)
        self.weights = StepWeights(context.sampler.num_steps, context.config, context.device)

    @staticmethod
    def costs(config: TrainingConfig, num_steps: int, *, from_start: bool = False) -> list[float]:
        """Count teacher, student, backward and lambda.

        The first three are at every step but the first; lambda is where it is due.
        """
        sdt, last = config.sdt, num_steps - 1
        step = 3.0 + sdt.activation_checkpointing
        trained = last if sdt.objective == "stepwise" else num_trained_in_pairs(num_steps)
        update = (step * trained + (num_steps - trained)) / num_steps
        generation = 1.0
        if follows_plan(sdt.student, sdt.objective):
            generation = 1 / assumed_speedup(config)
            update += generation
        generations = num_steps if from_start else (num_steps + 1) / 2
        refresh = generation * generations if config.iepo != "none" else 0.0
        return [update + refresh * (k % config.iepo_every == 0) for k in range(config.trajectories)]

    def step(self, batch: Any, average: Callable[[Tensor], None]) -> dict[str, float]:
        context, started = self.context, time.monotonic()
        sdt, target = context.sdt, context.target
        batches, metrics = batch.split(self.config.micro_batch_size), dict[str, float]()
        if self.weights.is_due(self.done):
            with sdt.stopwatch.measure("lambda"):
                metrics = self.weights.refresh(context.backend, sdt.router, batches, average)
        records = context.backend.train_trajectory(
            sdt,
            batches,
            self.weights.lambda_T,
            beta=target.beta,
            average=average,
            on_gradient=target.observe,
        )
        means = torch.tensor([[r.loss, r.mse, r.l1] for r in records], device=context.device).mean(0)
        average(means)
        metrics |= dict(zip(("loss", "mse", "l1"), means.tolist(), strict=True)) | {"beta": target.beta}
        metrics["updates_per_s"] = (context.sampler.num_steps - 1) / (time.monotonic() - started)
        target.spare(context.backend.fixed_steps)
        target.update()
        return metrics

    def state(self) -> Tensor:
        return self.weights.lambda_T

    def load_state(self, state: Tensor) -> None:
        self.weights.lambda_T = state.to(self.context.device)


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


PHASES: tuple[type[Phase], ...] = (StartPhase, RouterPhase, ChoicePhase, ForecastPhase)
"""The phases in the order in which they run."""


def phase_budgets(
    config: TrainingConfig, num_steps: int, *, target: float = 0.0, from_start: bool = False
) -> tuple[PhaseBudget, ...]:
    """Return the costs of the phases of one router's training, in order.

    Phases that are left out are not among them.

    Args:
        target: the speed to name them by.
        from_start: every run begins at the first step, as in a pipeline's own loop.
    """
    return tuple(
        PhaseBudget(phase.name, tuple(costs), 0.0 if phase is StartPhase else target)
        for phase in PHASES
        if (costs := phase.costs(config, num_steps, from_start=from_start))
    )


def target_configs(config: TrainingConfig) -> list[TrainingConfig]:
    """Return the settings of each target's training, the main one first."""
    main = dataclasses.replace(config, targets=())
    return [main] + [config.for_target(target_speedup=target) for target in config.extra_targets]


def all_phase_budgets(
    config: TrainingConfig, num_steps: int, *, from_start: bool = False
) -> tuple[PhaseBudget, ...]:
    """Return the budgets of a whole training, as `budgets_of` each target's settings.

    Args:
        from_start: every run begins at the first step, as in a pipeline's own loop.
    """
    return budgets_of(target_configs(config), num_steps, from_start=from_start)


def budgets_of(
    configs: Sequence[TrainingConfig], num_steps: int, *, from_start: bool = False
) -> tuple[PhaseBudget, ...]:
    """Return the budgets of trainings that follow each other, one for each target.

    The start, which is shared, comes first, and then each target's own.
    """
    phases: list[PhaseBudget] = []
    for one in configs:
        target = one.target_speedup if len(configs) > 1 else 0.0
        own = phase_budgets(one, num_steps, target=target, from_start=from_start)
        is_measured = any(phase.name == "start" for phase in phases)
        phases += [phase for phase in own if not is_measured or phase.name != "start"]
    return tuple(phases)
