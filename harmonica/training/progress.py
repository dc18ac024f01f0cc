"""The progress of a training, and its remaining time.

Costs are counted in full samplings of a trajectory's samples: T forwards with every branch computed. So the
length of a phase is known before it has begun, and one measured pace tells the time of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Literal

PhaseName = Literal["start", "router", "choice", "forecast"]
_MESSAGES: dict[PhaseName, str] = {
    "start": "measuring the start",
    "router": "training the router",
    "choice": "choosing the plan",
    "forecast": "fitting the forecasts",
}


@dataclass(frozen=True, slots=True)
class PhaseCosts:
    """The trajectories of one phase and what each will cost."""

    name: PhaseName
    costs: tuple[float, ...]
    """Cost of each trajectory, in full samplings of its samples."""
    target: float = 0.0
    """The speed that it is for, where several routers are trained; 0 where one is."""

    @property
    def trajectories(self) -> int:
        """Return the number of trajectories."""
        return len(self.costs)

    @property
    def message(self) -> str:
        """The phase in words, as in `training the router for 1.5x`."""
        return _MESSAGES[self.name] + (f" for {self.target:.4g}x" if self.target else "")


class Progress:
    """The progress of a training in its phases, and the remaining time."""

    def __init__(self, phases: Sequence[PhaseCosts]) -> None:
        self.phases = tuple(phases)
        self._ends = tuple(accumulate(phase.trajectories for phase in self.phases))
        costs = (cost for phase in self.phases for cost in phase.costs)
        self._spent = tuple(accumulate(costs, initial=0.0))

    @property
    def trajectories(self) -> int:
        """Number of trajectories of all phases."""
        return self._ends[-1]

    def cost(self, done: int | None = None) -> float:
        """Return the cost of `done` trajectories, by default all, in full samplings."""
        return self._spent[-1 if done is None else done]

    def place(self, done: int) -> int:
        """Return the number of the phase that goes on after `done` trajectories.

        In the end it is the last phase.
        """
        return next((k for k, end in enumerate(self._ends) if done < end), len(self._ends) - 1)

    def seconds_left(self, done: int, since: int, seconds: float) -> tuple[float, float]:
        """Return the time until the current phase ends and until all have.

        Both assume the pace so far.

        Args:
            done: trajectories so far.
            since: how many of them had been done when the `seconds` began; fewer.
        """
        pace = seconds / (self._spent[done] - self._spent[since])
        now, phase_end = self._spent[done], self._spent[self._ends[self.place(done)]]
        return pace * (phase_end - now), pace * (self._spent[-1] - now)

    def message(self, done: int) -> str:
        """Return the current phase and its progress.

        For example `training the router: 7 of 20 trajectories`.
        """
        place = self.place(done)
        phase, count = self.phases[place], self.phases[place].trajectories
        return f"{phase.message}: {done - self._ends[place] + count} of {count} trajectories"

    def time_left_message(self, done: int, since: int, seconds: float) -> str:
        """Return the time left, and what follows.

        For example `0:00:30 left in this phase, 0:01:40 in all`.
        """
        phase_left, all_left = (
            timedelta(seconds=round(left)) for left in self.seconds_left(done, since, seconds)
        )
        rest = ", ".join(phase.message for phase in self.phases[self.place(done) + 1 :])
        return (
            f"{phase_left} left in this phase, {all_left} in all; then {rest}" if rest else f"{all_left} left"
        )
