"""The interface of the phases of a router's training.

Their costs follow from the settings alone, in full samplings of a trajectory's samples: T forwards with every
branch computed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from harmonica.training.config import TrainingConfig
from harmonica.training.context import TrainingContext
from harmonica.training.progress import PhaseName

_UNKNOWN_SPEEDUP = 1.5
"""The speed that cost estimates assume of a plan without a target."""


class Phase(ABC):
    """One part of a router's training, which is a number of trajectories of one kind.

    `begin` is called once before its first trajectory, `step` for each of them, `finish` after the last.
    """

    name: ClassVar[PhaseName]
    state_key: ClassVar[str]
    """Key of its state in a checkpoint."""

    def __init__(self, context: TrainingContext) -> None:
        self.context = context
        self.count(context.config)
        self.done = 0
        """Number of its trajectories that are done."""

    def count(self, config: TrainingConfig) -> None:
        """Take the number of trajectories from these settings, before the first one."""
        self.config = config
        self.trajectories = len(self.costs(config, self.context.sampler.num_steps))

    @property
    def is_done(self) -> bool:
        """Return whether all of its trajectories are done."""
        return self.done == self.trajectories

    @staticmethod
    @abstractmethod
    def costs(config: TrainingConfig, num_steps: int, *, from_start: bool = False) -> list[float]:
        """Return the cost of each of its trajectories, in full samplings of its samples.

        Args:
            from_start: every run begins at the first step, as a pipeline's call does; else runs that differ
                from step i on share what lies before it.
        """

    def begin(self) -> None:  # noqa: B027  # most phases need nothing
        """Prepare the phase from the context that the phases before have left."""

    @abstractmethod
    def step(self, batch: Any, average: Callable[[Tensor], None]) -> dict[str, float]:
        """Do one trajectory and return the metrics to log.

        Args:
            average: averages a tensor over all workers in place.
        """

    def finish(self, batch: Any, average: Callable[[Tensor], None]) -> dict[str, float]:
        """Leave the outcome in the context and return more metrics.

        `batch` is that of the last step.
        """
        return {}

    @abstractmethod
    def state(self) -> Any:
        """Return the phase's state for a checkpoint besides `done`, or None."""

    @abstractmethod
    def load_state(self, state: Any) -> None:
        """Load what `state` returned; the context is loaded before."""


def assumed_speedup(config: TrainingConfig) -> float:
    """Return the speed of the plan to be trained, as far as the settings say it."""
    if config.target_cur:
        return 1 / (1 - config.target_cur)
    return config.target_speedup or _UNKNOWN_SPEEDUP
