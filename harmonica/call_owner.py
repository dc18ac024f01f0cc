"""Whose call a trajectory belongs to: pipelines do not say, so it is read from the stack.

A call that raised says nothing either, and its thread may live on, as a server's does. What tells a call
that runs from one that was broken off is whether its frame is still on the stack of its thread.
"""

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass(frozen=True, slots=True)
class CallOwner:
    """A thread, and the call of a diffusers pipeline that it is in."""

    thread: int
    thread_name: str
    pipeline_call: int | None
    """Address of its frame, as the frame itself would keep alive all that it has; None outside of one."""

    @classmethod
    def current(cls) -> "CallOwner":
        thread = threading.current_thread()
        call = next(_pipeline_calls(sys._getframe()), None)
        return cls(threading.get_ident(), thread.name, None if call is None else id(call))

    def is_running(self) -> bool:
        """Whether the pipeline's call has neither returned nor raised; False outside of one."""
        calls = _pipeline_calls(sys._current_frames().get(self.thread))
        return any(id(call) == self.pipeline_call for call in calls)


def is_interrupted_caller() -> bool:
    """Whether a pipeline calls that was told to stop: the loops of some then leave out the last steps."""
    pipes = (_pipeline(frame) for frame in _stack(sys._getframe()))
    pipe = next((each for each in pipes if each is not None), None)
    return getattr(pipe, "_interrupt", False) is True


def _pipeline_calls(frame: FrameType | None) -> Iterator[FrameType]:
    """Innermost first."""
    for each in _stack(frame):
        if each.f_code.co_name == "__call__" and _pipeline(each) is not None:
            yield each


def _pipeline(frame: FrameType) -> Any:
    """That whose method the frame is in, or None."""
    owner = frame.f_locals.get("self")
    return owner if hasattr(type(owner), "maybe_free_model_hooks") else None


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    """From a frame to the outermost."""
    while frame is not None:
        yield frame
        frame = frame.f_back
