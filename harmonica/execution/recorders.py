"""The interface of what stores a step's work and replays it.

A recording is of addresses: it reads and writes the tensors that were there when it was made. Inputs are
therefore buffers that are filled before a replay.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from harmonica.execution.capture_check import StepMode

Result = TypeVar("Result")
Replay = Callable[[], None]


class Recorder(ABC):
    """Records the steps of one trajectory, which are replayed in their order."""

    @abstractmethod
    def record(self, step: Callable[[], Result]) -> tuple[Result, Replay]:
        """Run a step and record its work.

        Returns:
            What the step returns, tensors that each replay writes anew; and the replay.

        Raises:
            RuntimeError: the step cannot be recorded.
        """

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep others from recording, from the warm-up to the last step."""
        yield

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run a trajectory before it is recorded.

        What is compiled or chosen at first use is then there.

        Raises:
            NotCapturableError: a step does what cannot be part of a graph.
        """
        run()

    def begin(self) -> None:
        """Prepare a trajectory's replay, before its inputs are filled."""
        return

    def pad(self, rows: Tensor, given: Tensor) -> None:
        """Fill the rows of a buffer that no image needs."""
        rows.copy_(given[:1].expand_as(rows), non_blocking=True)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory of what was recorded."""


def call_recorded(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Call a compiled function, as one operation where steps are recorded or checked."""
    mode = _get_current_dispatch_mode()
    return mode.run_compiled(function, tuple(args)) if isinstance(mode, StepMode) else function(*args)
