"""Protect a running call's scheduler against a second call.

A diffusers pipeline sets its scheduler's timesteps before it calls its transformer. When the transformer
refuses the call, a scheduler of several steps has lost what it knew of the first one, whose image would then
be another. So what sets the timesteps refuses too, while a call under a plan runs.
"""

import functools
import threading
from typing import Any

from harmonica.integrations.call_owner import CallOwner

_METHOD = "set_timesteps"


class SecondCallError(ValueError):
    """Raised for a call that comes while another one runs."""

    def __init__(self, owner: CallOwner) -> None:
        super().__init__(
            f"a second call came while one runs (in thread {owner.thread_name}): a pipeline with a plan does "
            "one at a time. Make them one after the other, or give each a copy.deepcopy of the pipeline"
        )


class SchedulerGuard:
    """Replaces a scheduler's `set_timesteps` until its owner's call is over."""

    def __init__(self, scheduler: Any, owner: CallOwner) -> None:
        self._scheduler, self._owner = scheduler, owner
        left = scheduler.set_timesteps
        if isinstance(left, SchedulerGuard):  # of a call that was broken off
            left._give_back()
        functools.update_wrapper(self, scheduler.set_timesteps)  # pipelines look at its parameters
        self._replaced = vars(scheduler).get(_METHOD)
        setattr(scheduler, _METHOD, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Give `set_timesteps` back to the scheduler, and call it.

        Raises:
            SecondCallError: the owner's call runs and this is another.
        """
        if self._owner != CallOwner.current() and self._owner.is_running():
            raise SecondCallError(self._owner)
        self._give_back()
        return self._scheduler.set_timesteps(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy as the scheduler's own method."""
        return getattr, (self._scheduler, _METHOD)

    @property
    def is_on(self) -> bool:
        """Return whether nothing has set the scheduler's timesteps since."""
        return vars(self._scheduler).get(_METHOD) is self

    def take_off(self) -> None:
        """Restore the scheduler's method unless another thread's call needs the guard."""
        if self._owner.thread == threading.get_ident() or not self._owner.is_running():
            self._give_back()

    def _give_back(self) -> None:
        if not self.is_on:
            return
        delattr(self._scheduler, _METHOD)
        if self._replaced is not None:
            setattr(self._scheduler, _METHOD, self._replaced)
