"""Track which step a transformer's call belongs to, and its place in the step.

A step may have several calls: guidance by two calls, at one timestep, or two transformers. What separates
steps is the scheduler's own count where it has one, else the timestep, whether that falls or rises.
"""

from collections import Counter
from collections.abc import Callable, Collection, Hashable
from typing import Any

from harmonica.integrations.call_owner import current_pipeline

CallKey = tuple[int, str, int]
"""Number of the transformer, name of the cache context, and index of the call among theirs in the step."""


def steps_of(pipe: Any) -> int | None:
    """Return a running pipeline's number of steps, or None if it does not say."""
    scheduler = getattr(pipe, "scheduler", None)
    timesteps = getattr(scheduler, "timesteps", None)
    given = getattr(pipe, "_num_timesteps", None)
    if isinstance(given, int):
        return given
    return None if timesteps is None else len(timesteps) - (getattr(scheduler, "begin_index", None) or 0)


def place_in_pipeline(timesteps: Callable[[], Collection[float]]) -> Hashable:
    """Return what all calls of a step have in common, and no calls of the next step.

    That is the scheduler's count of steps. Before its first step, and where the pipeline steps copies of it
    (SkyReels-V2), there is none yet.

    Args:
        timesteps: reads those of the call back from the device.

    Raises:
        ValueError: no scheduler counts, and the timesteps do not tell the step.
    """
    scheduler: Any = getattr(current_pipeline(), "scheduler", None)
    if (counted := getattr(scheduler, "step_index", None)) is not None:
        return int(counted)
    found = frozenset(timesteps())
    if len(found) == 1 or hasattr(scheduler, "step_index"):
        return found
    given = f"timestep is {sorted(found)}" if found else "the transformer is called without a timestep"
    raise ValueError(
        f"{given}, and the pipeline's scheduler does not count its steps: a plan has one step for the whole "
        "batch and cannot tell which it is; use a scheduler with a step_index"
    )


class CallTracker:
    """Counts the steps of a trajectory and the calls of each."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.reset()

    def reset(self) -> None:
        """Forget the trajectory; the next call begins a new one."""
        self.steps = 0
        self._first: Hashable = None
        self._place: Hashable = None
        self._calls = Counter[tuple[int, str]]()

    @property
    def unfinished(self) -> int:
        """Return the steps done of an unfinished trajectory; 0 if there is none."""
        return self.steps % self.num_steps

    def begins(self, place: Hashable) -> bool:
        """Return whether a call at this place begins a trajectory."""
        if self.steps == 0:
            return True
        is_new_step = place != self._place
        return is_new_step and (place == self._first or self.steps == self.num_steps)

    def locate(self, place: Hashable, transformer: int, context: str) -> tuple[int, CallKey]:
        """Return the step i of a call and its key, T-1 first."""
        if self.begins(place):
            self.reset()
            self._first = place
        if self.steps == 0 or place != self._place:
            self.steps += 1
            self._place = place
            self._calls.clear()
        count = self._calls[transformer, context]
        self._calls[transformer, context] += 1
        return self.num_steps - self.steps, (transformer, context, count)
