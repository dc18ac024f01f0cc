"""The phases of a training, what a trajectory of each costs, and how much time is left.

Costs are counted in full samplings of a trajectory's rows: T forwards with every branch computed. A reused
step counts as nothing, a backward through activations as a forward. So a phase's length is known before it
has begun, and one measured pace tells the time of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Literal, get_args

from harmonica.training.config import TrainingConfig

PhaseName = Literal["start", "router", "choice", "forecast"]
PHASES: tuple[PhaseName, ...] = get_args(PhaseName)
"""In the order that they come."""
_WORDS: dict[PhaseName, str] = {
    "start": "measuring the start",
    "router": "training the router",
    "choice": "choosing the plan",
    "forecast": "fitting the forecasts",
}
_UNKNOWN_SPEEDUP = 1.5
"""Of a plan that nothing is asked of beforehand."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Trajectories of one kind, one after another."""

    name: PhaseName
    costs: tuple[float, ...]
    """Of each trajectory, in full samplings of its rows."""
    target: float = 0.0
    """The speed that it is for, where several routers are trained."""

    @property
    def trajectories(self) -> int:
        return len(self.costs)

    @property
    def message(self) -> str:
        return _WORDS[self.name] + (f" for {self.target:g}x" if self.target else "")


def _speedup(config: TrainingConfig) -> float:
    """Of the plan that will be trained, as far as the settings say it."""
    if config.target_cur:
        return 1 / (1 - config.target_cur)
    return config.target_speedup or _UNKNOWN_SPEEDUP


def _start_costs(config: TrainingConfig, num_steps: int) -> list[float]:
    """`training.plans.search.step_effects`: every step reused alone, and with the one two before it."""
    last = num_steps - 1
    alone, after = sum(range(last)), sum(range(last - 2))  # full steps behind the reused ones
    costs = [1 + (alone + after) / num_steps] * config.start_trajectories
    if costs and config.target_psnr:  # the plan that is near enough is looked for on the last one's rows
        costs[-1] += 1 + sum(1 - count / num_steps for count in range(1, num_steps // 2 + 1))
    return costs


def _router_costs(config: TrainingConfig, num_steps: int) -> list[float]:
    """Teacher, student and backward at every step but the first run; and lambda, where it is due."""
    sdt, last = config.sdt, num_steps - 1
    step = 3.0 + sdt.activation_checkpointing
    trained = last if sdt.objective == "stepwise" else (last + 1) // 2
    update = (step * trained + (num_steps - trained)) / num_steps
    generation = 1.0
    if sdt.student == "hard" and sdt.objective == "stepwise":
        generation = 1 / _speedup(config)
        update += generation
    refresh = generation * (num_steps + 1) / 2 if config.iepo != "none" else 0.0
    return [update + refresh * (k % config.iepo_every == 0) for k in range(config.trajectories)]


def phases_of(config: TrainingConfig, num_steps: int, *, target: float = 0.0) -> tuple[Phase, ...]:
    """Those of one router's training, in order, without those that have no trajectories.

    Args:
        target: the speed to name them by.
    """
    planned, forecast = 1 / _speedup(config), config.forecast
    plans = 3 if config.start_trajectories else 2  # two starts and what was trained, or one start
    costs: dict[PhaseName, list[float]] = {
        "start": _start_costs(config, num_steps),
        "router": _router_costs(config, num_steps),
        "choice": [1 + plans * planned] * config.choice_trajectories,
        "forecast": [1 + (1 + forecast.probes) * planned] * forecast.trajectories,
    }
    return tuple(
        Phase(name, tuple(each), 0.0 if name == "start" else target) for name, each in costs.items() if each
    )


class Progress:
    """How far a training is in its phases, and how much time is left of the current one and of all."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = tuple(phases)
        self._ends = tuple(accumulate(phase.trajectories for phase in self.phases))
        costs = (cost for phase in self.phases for cost in phase.costs)
        self._spent = tuple(accumulate(costs, initial=0.0))

    @property
    def trajectories(self) -> int:
        """Of all phases."""
        return self._ends[-1]

    def place(self, done: int) -> int:
        """Number of the phase that goes on after so many trajectories; in the end the last one."""
        return next((k for k, end in enumerate(self._ends) if done < end), len(self._ends) - 1)

    def seconds_left(self, done: int, since: int, seconds: float) -> tuple[float, float]:
        """Until the current phase ends, and until all have, at the pace so far.

        Args:
            done: trajectories so far.
            since: how many of them had been done when the `seconds` began; fewer.
        """
        pace = seconds / (self._spent[done] - self._spent[since])
        now, phase_end = self._spent[done], self._spent[self._ends[self.place(done)]]
        return pace * (phase_end - now), pace * (self._spent[-1] - now)

    def message(self, done: int) -> str:
        """The current phase and how far it is, as in `training the router: 7 of 20 trajectories`."""
        place = self.place(done)
        phase, count = self.phases[place], self.phases[place].trajectories
        return f"{phase.message}: {done - self._ends[place] + count} of {count} trajectories"

    def time_left_message(self, done: int, since: int, seconds: float) -> str:
        """The time left, as in `0:00:30 left in this phase, 0:01:40 in all`, and which phases follow."""
        phase_left, all_left = (
            timedelta(seconds=round(left)) for left in self.seconds_left(done, since, seconds)
        )
        rest = ", ".join(phase.message for phase in self.phases[self.place(done) + 1 :])
        return (
            f"{phase_left} left in this phase, {all_left} in all; then {rest}" if rest else f"{all_left} left"
        )
