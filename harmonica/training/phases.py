"""The phases of a router's training and what each costs.

A start is measured, the router is trained from it, its plan is compared with those that need no training, and
the forecasts of the best plan are fitted. A phase without trajectories is left out.

What a trajectory costs follows from the settings alone, in full samplings of its samples: T forwards with
every branch computed. A reused step counts as nothing, a backward through activations as a forward.
"""

import dataclasses
from collections.abc import Sequence

from harmonica.training.choice_phase import ChoicePhase
from harmonica.training.config import TrainingConfig
from harmonica.training.forecast_phase import ForecastPhase
from harmonica.training.phase import Phase
from harmonica.training.progress import PhaseCosts
from harmonica.training.router_phase import RouterPhase
from harmonica.training.start_phase import StartPhase

PHASES: tuple[type[Phase], ...] = (StartPhase, RouterPhase, ChoicePhase, ForecastPhase)
"""The phases in the order in which they run."""


def phase_costs(
    config: TrainingConfig, num_steps: int, *, target: float = 0.0, from_start: bool = False
) -> tuple[PhaseCosts, ...]:
    """Return the costs of the phases of one router's training, in order.

    Phases that are left out are not among them.

    Args:
        target: the speed to name them by.
        from_start: every run begins at the first step, as in a pipeline's own loop.
    """
    return tuple(
        PhaseCosts(phase.name, tuple(costs), 0.0 if phase is StartPhase else target)
        for phase in PHASES
        if (costs := phase.costs(config, num_steps, from_start=from_start))
    )


def target_configs(config: TrainingConfig) -> list[TrainingConfig]:
    """Return the settings of each target's training, the main one first."""
    main = dataclasses.replace(config, targets=())
    return [main] + [config.for_target(target_speedup=target) for target in config.extra_targets]


def all_phase_costs(
    config: TrainingConfig, num_steps: int, *, from_start: bool = False
) -> tuple[PhaseCosts, ...]:
    """Return the costs of a whole training, as `costs_of` each target's settings.

    Args:
        from_start: every run begins at the first step, as in a pipeline's own loop.
    """
    return costs_of(target_configs(config), num_steps, from_start=from_start)


def costs_of(
    configs: Sequence[TrainingConfig], num_steps: int, *, from_start: bool = False
) -> tuple[PhaseCosts, ...]:
    """Return the costs of trainings that follow each other, one for each target.

    The start, which is shared, comes first, and then each target's own.
    """
    phases: list[PhaseCosts] = []
    for one in configs:
        target = one.target_speedup if len(configs) > 1 else 0.0
        own = phase_costs(one, num_steps, target=target, from_start=from_start)
        is_measured = any(phase.name == "start" for phase in phases)
        phases += [phase for phase in own if not is_measured or phase.name != "start"]
    return tuple(phases)
