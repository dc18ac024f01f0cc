"""Keep a training to its time (`train.budget`).

A full sampling is timed before the first trajectory, and the numbers of trajectories follow from it
(`harmonica.training.budget`). Wherever a phase ends, what is left is compared with the pace so far; if it
would take too long, the phases to come get fewer trajectories. Numbers never change within a phase.
"""

import time
from collections.abc import Mapping
from typing import Any

from harmonica.training.backend import TrajectoryBackend
from harmonica.training.budget import Numbers, cut_to_budget, numbers_of, with_numbers, within_budget
from harmonica.training.config import TrainingConfig
from harmonica.training.progress import Progress
from harmonica.training.timing import sampling_seconds, slowest


class TimeBudget:
    """The time of a training, and the numbers of trajectories that keep to it.

    All workers have the same numbers: what they follow from is that of the slowest one.
    """

    def __init__(self, config: TrainingConfig, backend: TrajectoryBackend) -> None:
        self.config, self.backend = config, backend
        self.planned = config
        """The settings with the numbers that were planned at first, of which there are never more."""
        self._since, self._spent_before = time.monotonic(), 0.0

    @property
    def numbers(self) -> Numbers:
        """Return the numbers of the phases that have not begun."""
        return numbers_of(self.config)

    @property
    def spent_s(self) -> float:
        """Return the seconds since the training began, without those between its runs."""
        return self._spent_before + time.monotonic() - self._since

    def plan(self, batch: Any) -> float:
        """Time a full sampling of a batch, choose the numbers and return its seconds.

        Raises:
            SettingError: the least training takes longer; on all workers alike.
        """
        device, num_steps = self.backend.device, self.backend.sampler.num_steps
        seconds = slowest(sampling_seconds(self.backend, batch, self.config.micro_batch_size), device)
        self.config = within_budget(
            self.config,
            num_steps,
            seconds,
            spent_s=slowest(self.spent_s, device),
            from_start=self.backend.from_start,
        )
        self.planned = self.config
        return seconds

    def adapt(self, progress: Progress, done: int) -> bool:
        """Choose fewer trajectories than planned if the rest takes too long.

        Returns whether the numbers have changed: fewer than before, or more again, up to those planned.

        Args:
            progress: of the training with the present numbers.
            done: its trajectories so far, which are those of whole phases.
        """
        spent_s, before = slowest(self.spent_s, self.backend.device), self.config
        self.config = cut_to_budget(
            self.planned,
            self.backend.sampler.num_steps,
            progress.place(done),
            spent_s / progress.cost(done),
            spent_s=spent_s,
            from_start=self.backend.from_start,
        )
        return self.config != before

    def message(self, progress: Progress, seconds_per_sampling: float) -> str:
        """Return what is planned, in a line.

        For example `train.budget is 20 minutes: measuring the start 2, training the router 40 trajectories;
        about 17.2 minutes`.
        """
        each = ", ".join(f"{phase.message} {phase.trajectories}" for phase in progress.phases)
        minutes = seconds_per_sampling * progress.cost() / 60
        return (
            f"train.budget is {self.config.budget:g} minutes: {each} trajectories; about {minutes:.3g} "
            f"minutes at {seconds_per_sampling:.3g} s for a full sampling"
        )

    def state(self) -> dict[str, Any]:
        """Return the numbers and the seconds for a checkpoint."""
        planned = numbers_of(self.planned)
        return {"numbers": dict(self.numbers), "planned": planned, "spent_s": self.spent_s}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load what `state` returned."""
        self.config = with_numbers(self.config, state["numbers"])
        self.planned = with_numbers(self.config, state["planned"])
        self._since, self._spent_before = time.monotonic(), state["spent_s"]
