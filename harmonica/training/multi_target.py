"""Train for several speeds at once.

Each has its own router; all begin from the same measured start.

The routers train after one another, each on the samples that it would see alone, so that each is bit for bit
what a training of its own would have made; what they share is the start, measured once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.plan import Plan
from harmonica.core.router import Router
from harmonica.samplers import Sampler
from harmonica.training.backend import TrajectoryBackend
from harmonica.training.budget import Numbers
from harmonica.training.config import TrainingConfig
from harmonica.training.feasibility import check_training
from harmonica.training.measured_speed import in_macs
from harmonica.training.phases import costs_of, target_configs
from harmonica.training.progress import Progress
from harmonica.training.time_budget import TimeBudget
from harmonica.training.timing import reused_share, slowest
from harmonica.training.trainer import RouterTrainer, average


class MultiTargetTrainer:
    """Trains a router for the main target, and then one for each extra speed.

    The extra speeds are those in `train.targets`; each has a `RouterTrainer`.

    Without extra speeds it is a single training.
    """

    def __init__(
        self,
        sampler: Sampler,
        config: TrainingConfig,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        backend: TrajectoryBackend | None = None,
    ) -> None:
        """Begin the trainings.

        Args:
            backend: what runs the trajectories of all, where it is not the sampler itself.

        Raises:
            SettingError: the model cannot be trained for one of the targets.
        """
        self.sampler, self.config, self.device = sampler, config, device
        has_pictures = backend.has_pictures if backend else None
        check_training(config, sampler.model, sampler.num_steps, has_pictures=has_pictures)
        self._seed, self._backend = seed, backend
        self._use(config)
        self.reused_share: float | None = None
        """The time of a reused step over a computed one's, where the speed is measured, once it is."""
        self.budget: TimeBudget | None = None
        """What keeps to `train.budget`, once a full sampling is timed."""
        self.announcement = ""
        """What was measured and decided of it, in a line; "" if nothing was."""

    def _use(self, config: TrainingConfig) -> None:
        """Begin the trainings with these settings, whose speeds are in MACs."""
        self._used, self._place = config, 0
        self.trainers = [
            RouterTrainer(self.sampler, one, seed=self._seed, device=self.device, backend=self._backend)
            for one in target_configs(config)
        ]
        self._count()

    @property
    def current(self) -> RouterTrainer:
        """The trainer whose router trains now; in the end the last one."""
        return self.trainers[self._place]

    @property
    def trajectory(self) -> int:
        """Number of trajectories done, for all targets; the start's count once."""
        begun = self.trainers[: self._place + 1]
        shared = [trainer.config.start_trajectories for trainer in begun]
        return sum(trainer.trajectory for trainer in begun) - (sum(shared) - max(shared))

    @property
    def next_trajectories(self) -> range:
        """The trajectories whose samples the current trainer still takes.

        They are empty when all trainers are done.
        """
        return range(self.current.trajectory, self.current.config.all_trajectories)

    @property
    def router(self) -> Router:
        """Return the router of the current target."""
        return self.current.router

    @property
    def plan(self) -> Plan:
        """Return the present plan of the current target's router."""
        return self.current.plan

    def train_one(self, batch: Any, average: Callable[[Tensor], None] = average) -> dict[str, float]:
        """Do one trajectory for the current target and return the metrics to log.

        The first one prepares, if `prepare` was not called.

        Raises:
            SettingError: `train.target_psnr` is out of reach; on all workers alike.
        """
        self.prepare(batch)
        place, context = self.progress.place(self.trajectory), self.current.context
        known = context.found_message
        metrics = self.current.train_one(batch, average)
        if len(self.trainers) > 1:
            metrics["target_speedup"] = self.current.context.target.speedup
        if not self.next_trajectories and self._place + 1 < len(self.trainers):
            self._go_on()
        said = [context.found_message] if context.found_message != known else []
        if self.budget is not None and self.progress.place(self.trajectory) != place:
            said += self._keep_to(self.budget)
        self.announcement = "; ".join(said) or self.announcement
        return metrics

    def prepare(self, batch: Any) -> None:
        """Measure what `train.speed` and `train.budget` need, unless it is measured.

        Args:
            batch: of this worker, on which samplings are timed.

        Raises:
            SettingError: the speed or the budget is out of reach; on all workers alike.
        """
        backend, said = self.current.context.backend, list[str]()
        if self.config.speed == "measured" and self.reused_share is None:
            self._measure_speed(slowest(reused_share(backend, batch, self.config), backend.device))
            speeds = zip(target_configs(self.config), self.trainers, strict=True)
            each = ", ".join(
                f"{one.target_speedup:g}x is {trainer.config.target_speedup:.3g}x in MACs"
                for one, trainer in speeds
            )
            said.append(
                f"train.speed is measured: a reused step takes {self.reused_share:.1%} of the time of a "
                f"computed one, so {each}"
            )
        if self.config.budget and self.budget is None:
            budget = TimeBudget(self._used, backend)
            seconds = budget.plan(batch)
            self.budget = budget
            self._set_numbers([budget.numbers] * len(self.trainers))
            said.append(budget.message(self.progress, seconds))
        if said:
            self.announcement = "; ".join(said)

    def _measure_speed(self, share: float) -> None:
        """Aim at the speeds in MACs that follow from a measured share."""
        self.reused_share, model, num_steps = share, self.sampler.model, self.sampler.num_steps
        used = in_macs(self.config, share, model.macs(), num_steps)
        check_training(used, model, num_steps, has_pictures=True)
        self._use(used)

    def _keep_to(self, budget: TimeBudget) -> list[str]:
        """Take fewer trajectories where those planned would take too long.

        What is said of it is returned.
        """
        done, before = self.trajectory, self.all_trajectories
        if not budget.adapt(self.progress, done):
            return []
        for trainer in self.trainers[self._place :]:
            trainer.set_numbers(budget.numbers)
        self._count()
        return [
            f"train.budget is {self.config.budget:g} minutes and {budget.spent_s / 60:.3g} are over: "
            f"{self.all_trajectories - done} trajectories follow, not {before - done}"
        ]

    def _set_numbers(self, numbers: Sequence[Numbers]) -> None:
        for trainer, own in zip(self.trainers, numbers, strict=True):
            trainer.set_numbers(own)
        self._count()

    def _count(self) -> None:
        """Count the trajectories of all phases anew."""
        backend, num_steps = self.trainers[0].context.backend, self.sampler.num_steps
        configs = [trainer.config for trainer in self.trainers]
        self.progress = Progress(costs_of(configs, num_steps, from_start=backend.from_start))

    @property
    def all_trajectories(self) -> int:
        """Return the number of trajectories of all phases and all targets."""
        return self.progress.trajectories

    def _go_on(self) -> None:
        before = self.trainers[: self._place + 1]
        self._place += 1
        measured = (trainer for trainer in before if trainer.config.start_trajectories)
        self.current.start_as(next(measured, before[0]))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the states of the trainers that have begun."""
        state: dict[str, Any] = {"members": [one.state() for one in self.trainers[: self._place + 1]]}
        if self.reused_share is not None:
            state["reused_share"] = self.reused_share
        if self.budget is None:
            return state
        numbers = [dict(trainer.numbers) for trainer in self.trainers]
        return state | {"budget": self.budget.state(), "numbers": numbers}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._place = 0
        if "reused_share" in state:
            self._measure_speed(state["reused_share"])
        if "budget" in state:
            self.budget = TimeBudget(self._used, self.current.context.backend)
            self.budget.load_state(state["budget"])
            self._set_numbers(state["numbers"])
        for place, kept in enumerate(state["members"]):
            if place:
                self._go_on()
            self.current.load_state(kept)

    def artifact(self, **provenance: Any) -> RouterArtifact:
        """Return the router of the main target."""
        return self.trainers[0].artifact(**provenance)

    def extra_artifacts(self, **provenance: Any) -> dict[str, RouterArtifact]:
        """Return the routers of the extra speeds, by the name of the speed, as in "1.5x"."""
        return {
            target_name(target): trainer.artifact(**provenance | {"target_speedup": target})
            for target, trainer in self.extra_trainers.items()
        }

    @property
    def extra_trainers(self) -> dict[float, RouterTrainer]:
        """Return the trainers of the extra speeds."""
        return dict(zip(self.config.extra_targets, self.trainers[1:], strict=True))


def target_name(target: float) -> str:
    """Return the name of an extra speed's router.

    It names its folder, its variant and its part of a version's tags.
    """
    return f"{target:g}x"
