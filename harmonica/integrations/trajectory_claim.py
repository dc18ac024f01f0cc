"""Claim a transformer for one pipeline call; refuse a second one meanwhile."""

import logging
import threading
from collections.abc import Callable

from harmonica.integrations.call_owner import CallOwner, current_pipeline
from harmonica.integrations.scheduler_guard import SchedulerGuard, SecondCallError

logger = logging.getLogger(__name__)


class TrajectoryClaim:
    """Records a trajectory's owner and guards that pipeline's scheduler."""

    def __init__(self) -> None:
        self._owner: CallOwner | None = None
        self._guard: SchedulerGuard | None = None
        self._following: set[int] = set()  # threads with a step since their last end of a call
        self._lock = threading.Lock()

    def take(self, begins: Callable[[bool], bool]) -> bool:
        """Claim a step for the call that is running in this thread.

        Args:
            begins: whether the step is a trajectory's first; it is told whether another call makes the step.

        Returns:
            Whether the step is the trajectory's first.

        Raises:
            SecondCallError: another call's trajectory is under way.
        """
        caller = CallOwner.current()
        with self._lock:
            owner = self._owner
            is_other = owner != caller or (self._guard is not None and not self._guard.is_on)
            is_first_step = begins(is_other)
            if owner is not None and owner.bars(caller, is_first_step=is_first_step):
                raise SecondCallError(owner)
            if owner is None or is_first_step:
                self._owner = caller
                self._guard_scheduler(caller)
        self._following.add(threading.get_ident())
        return is_first_step

    def is_callers(self) -> bool:
        """Return whether the trajectory belongs to the call running in this thread."""
        owner, guard = self._owner, self._guard
        if owner is None or owner.pipeline_call is None or guard is None or not guard.is_on:
            return False
        return owner == CallOwner.current()

    def _guard_scheduler(self, owner: CallOwner) -> None:
        scheduler = getattr(current_pipeline(), "scheduler", None)
        if owner.pipeline_call is not None and hasattr(scheduler, "set_timesteps"):
            self._guard = SchedulerGuard(scheduler, owner)

    def release(self) -> None:
        """Let another thread begin; what it must not see is dropped before this."""
        self._owner = None

    def drop(self, forget: Callable[[], None]) -> bool:
        """Drop the trajectory unless another thread owns it; returns whether it is gone.

        Args:
            forget: drops what is kept of it.
        """
        with self._lock:
            if self._owner is not None and self._owner.thread != threading.get_ident():
                return False
            if self._guard is not None:
                self._guard.take_off()
            self._guard = None
            forget()
            self._owner = None  # the last: from here on another thread may begin
            return True

    def check_end(self, steps: int, wanted: int, *, is_checked: bool) -> None:
        """Report what was wrong with a pipeline's call that has ended.

        Args:
            steps: of the trajectory that it left unfinished; 0 for none.
            wanted: the router's steps.
            is_checked: whether each step's timestep was compared with the router's.

        Raises:
            ValueError: it ended early, where steps were only counted and it was not interrupted.
        """
        is_followed = threading.get_ident() in self._following
        self._following.discard(threading.get_ident())
        is_interrupted = getattr(current_pipeline(), "_interrupt", False) is True
        if not is_followed and CallOwner.current().pipeline_call is not None and not is_interrupted:
            logger.warning(
                "the pipeline's images were made without the plan: something, such as another cache, has "
                "replaced transformer.forward. Take that off, or load the transformer anew and apply"
            )
        elif steps and (is_checked or is_interrupted):
            logger.warning(
                "the pipeline ended after %d of the router's %d steps: it was interrupted, or was given "
                "fewer. The next call begins anew",
                *(steps, wanted),
            )
        elif steps:
            raise ValueError(
                f"the pipeline ended after {steps} of the router's {wanted} steps: give it "
                f"num_inference_steps {wanted}"
            )
