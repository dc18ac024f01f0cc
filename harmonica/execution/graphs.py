"""Recorded trajectories of a model, kept within a bound on their memory."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.execution.capture_check import NotCapturableError
from harmonica.execution.compiled import RecompileLimitError
from harmonica.execution.cuda_recorder import CudaRecorder
from harmonica.execution.recorders import Recorder, Replay

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 32)
"""Batch sizes that trajectories are recorded for; a batch is padded to the next one."""
_REMEMBERED = 256


def bucket_of(size: int) -> int | None:
    """Return the smallest bucket that holds a batch; None where there is none."""
    return next((each for each in BUCKETS if each >= size), None)


def sizes_up_to(most: int) -> tuple[int, ...]:
    """Return batch sizes up to `most` that fill every bucket such batches need."""
    return (*(each for each in BUCKETS if each < most), most)


def make_recorder(device: torch.device, known: Sequence[Tensor]) -> Recorder:
    """Return what records on a device.

    Args:
        known: tensors that stay where they are: weights and input buffers.

    Raises:
        NotCapturableError: it is no CUDA device, or one of the tensors lies elsewhere.
    """
    for each in known:
        if each.device.type != "cuda":
            raise NotCapturableError(f"a tensor lies on the {each.device.type}, and graphs are of CUDA alone")
    return CudaRecorder(device)


def addresses_of(module: nn.Module) -> tuple[int, ...]:
    """Return the addresses of a module's tensors.

    A recording holds them as constants. All are needed: after a move some may lie where they were.
    """
    return tuple(each.data_ptr() for each in (*module.parameters(), *module.buffers()))


@dataclass
class RecordedTrajectory:
    """The steps of one plan at one batch size, with the buffers that they read."""

    recorder: Recorder
    inputs: list[Tensor]
    """Buffers whose first dimension is the bucket."""
    replays: list[Replay] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    """What each step returned: tensors that its replay writes anew."""
    nbytes: int = 0
    """Memory of the recording with its buffers."""

    @classmethod
    def on(cls, module: nn.Module, given: Sequence[Tensor], rows: int) -> "RecordedTrajectory":
        """Return a recording of nothing yet, with buffers that hold a batch.

        Args:
            module: what is run; its weights stay where they are.
            given: the batch, on the device.
            rows: of each buffer, no fewer than the batch has.

        Raises:
            NotCapturableError: nothing can be recorded where the module is.
        """
        buffers = [each.new_zeros((rows, *each.shape[1:])) for each in given]
        recorder = make_recorder(given[0].device, [*module.parameters(), *module.buffers(), *buffers])
        recorded = cls(recorder, buffers)
        recorded.begin(given)
        return recorded

    def record(self, steps: Sequence[Callable[[], Any]]) -> None:
        """Run and record the steps in order.

        Raises:
            RuntimeError: a step cannot be recorded.
        """
        for step in steps:
            result, replay = self.recorder.record(step)
            self.results.append(result)
            self.replays.append(replay)
        self.nbytes = self.recorder.nbytes + sum(each.nbytes for each in self.inputs)

    def begin(self, given: Sequence[Tensor]) -> None:
        """Begin a trajectory's replay with a batch."""
        self.recorder.begin()
        self.fill(given)

    def fill(self, given: Sequence[Tensor], first: int = 0) -> None:
        """Copy a batch into buffers, from the first of them on, and pad those."""
        for buffer, rows in zip(self.inputs[first : first + len(given)], given, strict=True):
            buffer[: len(rows)].copy_(rows, non_blocking=True)
            if len(rows) < len(buffer):
                self.recorder.pad(buffer[len(rows) :], rows)


class GraphStore:
    """Recorded trajectories, the least recently used of which go first.

    What is asked for once is not recorded: recording takes longer than a trajectory. Copies begin empty.
    """

    def __init__(self, max_bytes: int, cure: str = "give model.graph-memory more") -> None:
        """Keep nothing yet.

        Args:
            max_bytes: of all recordings together.
            cure: what to do where one alone takes more, for the log.
        """
        self.max_bytes, self.cure = max_bytes, cure
        self.lock = threading.Lock()
        """Held while a trajectory is filled and replayed: its buffers are for one batch at a time."""
        self._kept: OrderedDict[Hashable, RecordedTrajectory] = OrderedDict()
        self._asked: OrderedDict[Hashable, None] = OrderedDict()
        self._reasons: set[str] = set()
        self._refused: set[Hashable] = set()
        self._failed: set[Hashable] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphStore, (self.max_bytes, self.cure)

    def find(self, key: Hashable, make: Callable[[], RecordedTrajectory]) -> RecordedTrajectory | None:
        """Return the trajectory of a key, recorded when it is asked for the second time.

        Returns:
            None where there is none yet, or where it cannot be recorded: the steps then run as they are.

        Raises:
            RecompileLimitError: the branches may have no more graphs of torch.compile.
        """
        if key in self._refused:
            return None
        if (found := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return found
        if key not in self._asked:
            self._asked[key] = None
            if len(self._asked) > _REMEMBERED:
                self._asked.popitem(last=False)
            return None
        try:
            made = make()
        except RecompileLimitError:
            raise
        except NotCapturableError as error:
            self._refuse(key, str(error))
            return None
        except RuntimeError as error:
            # Another thread's work, or memory that others had: it may be gone the next time.
            if key in self._failed:
                self._refuse(key, str(error))
            self._failed.add(key)
            if isinstance(error, torch.OutOfMemoryError):
                self._kept.clear()
            return None
        if made.nbytes > self.max_bytes:
            self._refuse(key, f"it takes {made.nbytes / 2**20:.0f} MiB, {self.cure}")
            return None
        self._kept[key] = made
        while self.nbytes > self.max_bytes:
            self._kept.popitem(last=False)
        return made

    def _refuse(self, key: Hashable, reason: str) -> None:
        self._refused.add(key)
        self.say_once(reason)

    def say_once(self, reason: str) -> None:
        """Log why something runs without a graph, unless that was said before."""
        if reason not in self._reasons:
            self._reasons.add(reason)
            logger.warning("runs compiled, without a graph of its steps: %s", reason)

    @property
    def reasons(self) -> frozenset[str]:
        """Return what was said about runs without a graph."""
        return frozenset(self._reasons)

    @property
    def nbytes(self) -> int:
        """Memory of all recorded trajectories."""
        return sum(each.nbytes for each in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)
