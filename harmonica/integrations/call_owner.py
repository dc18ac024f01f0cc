"""Read from the stack which thread and pipeline call a trajectory belongs to.

Pipelines do not pass it on. A call is running as long as its frame is on the stack of its thread; a call that
raised leaves no other sign, and its thread may live on, as a server's does.
"""

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass(frozen=True, slots=True)
class CallOwner:
    """Identifies a thread and the call of a diffusers pipeline that it is in."""

    thread: int
    thread_name: str
    pipeline_call: int | None
    """Address of its frame, as the frame itself would keep alive all that it has; None outside of one."""

    @classmethod
    def current(cls) -> "CallOwner":
        """Return the present thread and the pipeline's call that it is in."""
        thread = threading.current_thread()
        call = next((frame for frame in _stack(sys._getframe()) if _is_pipeline_call(frame)), None)
        return cls(threading.get_ident(), thread.name, None if call is None else id(call))

    def bars(self, other: "CallOwner", *, is_first_step: bool) -> bool:
        """Return whether a step of another call would interrupt this call."""
        if self == other:
            return False
        # A first step may follow a call that was broken off; a later one belongs to this one's thread.
        return self.is_running() if is_first_step else self.thread != other.thread

    def is_running(self) -> bool:
        """Return whether the pipeline's call has neither returned nor raised."""
        frames = _stack(sys._current_frames().get(self.thread))
        return any(id(frame) == self.pipeline_call and _is_pipeline_call(frame) for frame in frames)


def current_pipeline() -> Any:
    """Return the innermost diffusers pipeline on the stack, or None."""
    pipes = (_pipeline(frame) for frame in _stack(sys._getframe()))
    return next((each for each in pipes if each is not None), None)


def _is_pipeline_call(frame: FrameType) -> bool:
    return frame.f_code.co_name == "__call__" and _pipeline(frame) is not None


def _pipeline(frame: FrameType) -> Any:
    """Return the pipeline whose method the frame runs, or None."""
    owner = frame.f_locals.get("self")
    return owner if hasattr(type(owner), "maybe_free_model_hooks") else None


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the frames from this one to the outermost."""
    while frame is not None:
        yield frame
        frame = frame.f_back
