"""Choose the numbers of trajectories that fit into a time (`train.budget`).

What a trajectory costs follows from the settings (`harmonica.training.phases`), so one measured time of a
full sampling tells the minutes of any numbers. The numbers lie on one path from the least to the most, and
the longest part of it that fits is taken: more time never means fewer trajectories of a phase.

The path is in the order of what pays (`tests/benchmarks/RESULTS.md`): the fit of forecasts and the measured
start come first, the router's own updates grow last.
"""

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, TypeVar

from harmonica.training.config import OF_STEPS, TrainingConfig
from harmonica.training.phases import all_phase_costs
from harmonica.training.progress import PhaseName
from harmonica.validation.settings import SettingError

Numbers = Mapping[PhaseName, int]
"""The number of trajectories that the settings give for each phase."""

_Config = TypeVar("_Config", bound=TrainingConfig)
_PLANNED = 0.9
"""The share of the time that is planned for; costs are right within some ten percent."""
_FIELDS: dict[PhaseName, str] = {
    "start": "start_trajectories",
    "router": "trajectories",
    "choice": "choice_trajectories",
}
_USED = {"trajectories": "router_trajectories"}
_LEAST: dict[PhaseName, int] = {"start": 1, "router": 1, "choice": 1, "forecast": 6}
_LEAST_WITHOUT_START = 20
"""Trajectories without which a router that starts from no whole steps has learned nothing."""
_MOST: dict[PhaseName, int] = {"start": 12, "choice": 6, "forecast": 60}
_MOST_UPDATES = 20_000
"""Updates of the router, as many as the released code makes."""
_TO_THE_SETTINGS: tuple[tuple[PhaseName, ...], ...] = (
    ("forecast",),
    ("start",),
    ("router", "choice"),
)
_BEYOND: tuple[tuple[PhaseName, ...], ...] = (("start", "choice", "forecast"), ("router",))


def numbers_of(config: TrainingConfig) -> dict[PhaseName, int]:
    """Return the numbers of trajectories that settings give, by phase."""
    numbers: dict[PhaseName, int] = {phase: getattr(config, name) for phase, name in _FIELDS.items()}
    return numbers | {"forecast": config.forecast.trajectories}


def with_numbers(config: _Config, numbers: Numbers) -> _Config:
    """Return the settings with these numbers, and others as they are."""
    wanted = numbers_of(config) | dict(numbers)
    changes: dict[str, Any] = {name: wanted[phase] for phase, name in _FIELDS.items()}
    forecast = dataclasses.replace(config.forecast, trajectories=wanted["forecast"])
    return dataclasses.replace(config, forecast=forecast, **changes)


def with_used_numbers(provenance: Mapping[str, Any], numbers: Numbers) -> dict[str, Any]:
    """Return an artifact's provenance with these numbers in place of those set.

    `router_trajectories` is `train.trajectories`, since an artifact's `trajectories` are those of all phases.
    """
    forecast = {**provenance.get("forecast", {}), "trajectories": numbers["forecast"]}
    own = {_USED.get(name, name): numbers[phase] for phase, name in _FIELDS.items()}
    return {**provenance, **own, "forecast": forecast}


def used_numbers(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers that `with_used_numbers` has put into a provenance."""
    own = {name: provenance[name] for name in (_USED.get(field, field) for field in _FIELDS.values())}
    return own | {"forecast": {"trajectories": provenance["forecast"]["trajectories"]}}


def within_budget(
    config: _Config,
    num_steps: int,
    seconds_per_sampling: float,
    *,
    spent_s: float = 0.0,
    from_start: bool = False,
) -> _Config:
    """Return the settings with the most trajectories that `train.budget` allows.

    Phases that the settings leave out stay out.

    Args:
        seconds_per_sampling: of a full sampling of a worker's share of a batch.
        spent_s: what the budget has already been spent on.
        from_start: every run begins at the first step, as in a pipeline's own loop.

    Raises:
        SettingError: the least training takes longer.
    """
    phases = all_phase_costs(config, num_steps, from_start=from_start)
    asked = {name: count for name, count in numbers_of(config).items() if name in {p.name for p in phases}}
    path = _path(_least(config, asked), asked, _most(asked, num_steps))

    def seconds(numbers: Numbers) -> float:
        return _seconds(with_numbers(config, numbers), num_steps, seconds_per_sampling, 0, from_start)

    count = bisect_right(path, _PLANNED * 60 * config.budget - spent_s, key=seconds)
    if not count:
        least = (seconds(path[0]) + spent_s) / 60 / _PLANNED
        raise SettingError(
            f"train.budget is {config.budget:g}: the shortest training with these settings takes "
            f"{_up(least):g} minutes here, give so many or more, or 0 for the numbers of trajectories as set"
        )
    return with_numbers(config, path[count - 1])


def cut_to_budget(
    config: _Config,
    num_steps: int,
    place: int,
    seconds_per_sampling: float,
    *,
    spent_s: float,
    from_start: bool = False,
) -> _Config:
    """Return the settings with fewer trajectories, if else the budget is exceeded.

    Where even the least would, they are the least: what has begun is finished.

    Args:
        place: the number of the first phase that has not begun, among `all_phase_costs`; those before keep
            their trajectories whatever the settings say.
        seconds_per_sampling: what the phases before have taken.
        spent_s: since the training began.
        from_start: every run begins at the first step, as in a pipeline's own loop.
    """

    def seconds(numbers: Numbers) -> float:
        return _seconds(with_numbers(config, numbers), num_steps, seconds_per_sampling, place, from_start)

    left_s = 60 * config.budget - spent_s
    if seconds({}) <= left_s:
        return config
    later = {phase.name for phase in all_phase_costs(config, num_steps, from_start=from_start)[place:]}
    present = {name: count for name, count in numbers_of(config).items() if name in later}
    path = _path(_least(config, present), present, present)
    count = bisect_right(path, _PLANNED * left_s, key=seconds)
    return with_numbers(config, path[max(0, count - 1)])


def _seconds(
    config: TrainingConfig, num_steps: int, seconds_per_sampling: float, place: int, from_start: bool
) -> float:
    phases = all_phase_costs(config, num_steps, from_start=from_start)[place:]
    return seconds_per_sampling * sum(sum(phase.costs) for phase in phases)


def _least(config: TrainingConfig, asked: Numbers) -> dict[PhaseName, int]:
    """Return the fewest trajectories of each phase, at most those that are set."""
    least = dict(_LEAST)
    if config.initial not in OF_STEPS:
        least["router"] = _LEAST_WITHOUT_START
    return {name: min(count, least[name]) for name, count in asked.items()}


def _most(asked: Numbers, num_steps: int) -> dict[PhaseName, int]:
    """Return the most trajectories of each phase; no fewer than the settings ask for."""
    most = _MOST | {"router": _MOST_UPDATES // num_steps}
    return {name: max(count, most[name]) for name, count in asked.items()}


def _path(
    least: Mapping[PhaseName, int], asked: Numbers, most: Mapping[PhaseName, int]
) -> list[dict[PhaseName, int]]:
    """Return numbers from the least to the most; none is below those before."""
    path = [dict(least)]
    for goal, legs in ((asked, _TO_THE_SETTINGS), (most, _BEYOND)):
        for names in legs:
            before = path[-1]
            gaps = {name: goal[name] - before[name] for name in names if name in before}
            length = max(gaps.values(), default=0)
            path += [
                before | {name: before[name] + gap * k // length for name, gap in gaps.items()}
                for k in range(1, length + 1)
            ]
    return path


def _up(number: float) -> float:
    """Return a number rounded up to two digits."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return round(math.ceil(number / unit) * unit, 12)
