"""Recorders store a step's work and replay it: CUDA graphs, and a CPU twin.

A recording is of addresses: it reads and writes the tensors that were there when it was made. Inputs are
therefore buffers that are filled before a replay. The twin replays operation by operation into the recorded
tensors, and refuses what a capture on CUDA refuses: values read back, and tensors that come from the host.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from harmonica.execution.capture_check import (
    CaptureCheck,
    NotCapturableError,
    StepMode,
    draws_numbers,
    reads_back,
    tensors_in,
)

Result = TypeVar("Result")
Replay = Callable[[], None]

aten = torch.ops.aten
_MADE_ON_THE_DEVICE = {
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.full.default,
    aten.linspace.default,
    aten.ones.default,
    aten.scalar_tensor.default,
    aten.zeros.default,
}


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


class CudaRecorder(Recorder):
    """Records CUDA graphs in one memory pool.

    Later steps read a step's results at the address where it left them.

    Written after torch's documentation and its source; no GPU has run it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _capture_stream(device)

    @contextmanager
    def recording(self) -> Iterator[None]:
        # A process may capture one graph at a time: the generator, the stream and the allocator are shared.
        with _capture_lock():
            try:
                yield
            finally:
                torch._C._cuda_clearCublasWorkspaces()

    def warm_up(self, run: Callable[[], object]) -> None:
        current = torch.cuda.current_stream(self._device)
        # On the stream of the capture, as torch's documentation asks.
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), CaptureCheck():
            run()
        current.wait_stream(self._stream)
        torch.cuda.empty_cache()  # the pool cannot use what the run has left
        # cuBLAS keeps a workspace for each stream, which whoever records graphs may let go of, as
        # torch.compile does. So it is made in the pool, during the capture, and let go of after it.
        torch._C._cuda_clearCublasWorkspaces()

    def record(self, step: Callable[[], Result]) -> tuple[Result, Replay]:
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph: it empties the allocator's cache at every step, beside a model that serves,
        # and leaves its stream the current one where a capture fails.
        with torch.cuda.stream(self._stream):
            # Of what it makes, the generator's seeds are kept for graphs that others capture.
            with torch.inference_mode(False):
                # Other threads may go on, such as one that decodes a preview.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = step()
            except BaseException:
                self._abandon(graph)
                raise
            graph.capture_end()
        return result, graph.replay

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that has failed, so that the allocator goes on as before."""
        with suppress(RuntimeError):
            graph.capture_end()
        with suppress(RuntimeError):  # after an error in capture_end it still fills the pool
            torch._C._cuda_endAllocateToPool(self._stream.device.index, self._pool)

    @property
    def nbytes(self) -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(each["total_size"] for each in segments if each["segment_pool_id"] == tuple(self._pool))


@lru_cache(maxsize=1)
def _capture_lock() -> threading.Lock:
    return threading.Lock()


@lru_cache(maxsize=8)
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which all graphs of a device are captured.

    With each stream cuBLAS takes another workspace, of 32 MiB and more.
    """
    return torch.cuda.Stream(device)


class HostRecorder(Recorder):
    """The twin on a CPU, for tests: slower than running the steps, and stricter.

    Before each replayed trajectory all recorded results become NaN, and so do padding rows: a stale value, or
    a row that leaks into another, shows in the images.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        """Keep nothing but what stays where it is.

        Args:
            known: tensors that stay where they are: weights and input buffers.
        """
        self._known = list(known)
        self.storages = {_storage(each) for each in self._known}
        self.results: list[Tensor] = []

    def record(self, step: Callable[[], Result]) -> tuple[Result, Replay]:
        mode = _Operations(self)
        with mode, _Reads(self):
            result = step()
        return result, mode.replay

    def begin(self) -> None:
        for each in self.results:
            if each.is_floating_point():
                each.fill_(float("nan"))

    def pad(self, rows: Tensor, given: Tensor) -> None:
        if rows.is_floating_point():
            rows.fill_(float("nan"))
        else:
            super().pad(rows, given)

    def keep(self, result: Tensor) -> None:
        """Take in a tensor that a recorded operation has made."""
        self.storages.add(_storage(result))
        self.results.append(result)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.results)


class _Reads(TorchFunctionMode):
    """Refuses what reads a tensor's memory directly, past the dispatcher."""

    _METHODS = (Tensor.tolist, Tensor.numpy, Tensor.cpu)

    def __init__(self, recorder: HostRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._METHODS and _storage(args[0]) in self._recorder.storages:
            raise NotCapturableError(f"Tensor.{func.__name__} reads a value back inside a step")
        return func(*args, **(kwargs or {}))


class _Operations(StepMode):
    """The operations of one step, in order, with the tensors they read and wrote."""

    def __init__(self, recorder: HostRecorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if draws_numbers(func):
            raise NotCapturableError(f"{func} draws numbers inside a step")
        return self.call(func, args, kwargs)

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run and record an operation, or a compiled function as one."""
        inputs = tensors_in((args, kwargs))
        known = [_storage(each) in self._recorder.storages for each in inputs]
        if any(known):
            if reads_back(func, inputs):
                raise NotCapturableError(f"{func} reads a value back inside a step")
            if foreign := [each for each, is_known in zip(inputs, known) if not is_known and each.ndim]:
                raise NotCapturableError(
                    f"{func} takes a tensor of shape {tuple(foreign[0].shape)} that is neither an input nor "
                    "made from one: it would be copied from the host inside a step"
                )
        elif func not in _MADE_ON_THE_DEVICE:
            return func(*args, **kwargs)  # on the host, such as a scheduler's own numbers
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        before = {_storage(each) for each in inputs}
        made = [each for each in outputs if _storage(each) not in before]
        for each in made:
            self._recorder.keep(each)
        if made or not isinstance(func, torch._ops.OpOverload) or func._schema.is_mutable:  # no view
            self._calls.append((func, args, kwargs, outputs))
        return result

    def run_compiled(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with _disable_current_modes(), _pop_mode_temporarily():
            return self.call(function, args, {})

    def replay(self) -> None:
        for func, args, kwargs, outputs in self._calls:
            for recorded, new in zip(outputs, tensors_in(func(*args, **kwargs)), strict=True):
                if _storage(new) != _storage(recorded):
                    recorded.copy_(new)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def call_recorded(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Call a compiled function, as one operation where steps are recorded or checked."""
    mode = _get_current_dispatch_mode()
    return mode.run_compiled(function, tuple(args)) if isinstance(mode, StepMode) else function(*args)


def make_recorder(device: torch.device, known: Iterable[Tensor]) -> Recorder:
    """Return what records on a device."""
    return CudaRecorder(device) if device.type == "cuda" else HostRecorder(known)
