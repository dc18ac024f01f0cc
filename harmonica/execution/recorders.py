"""Recorders store a step's work and replay it: CUDA graphs, and a CPU twin.

A recording is of addresses: it reads and writes the tensors that were there when it was made. Inputs are
therefore buffers that are filled before a replay. The twin replays operation by operation into the recorded
tensors, and refuses what a capture on CUDA refuses: values read back, and tensors that come from the host.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")
Replay = Callable[[], None]

aten = torch.ops.aten
_READS_BACK = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
}
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


class NotCapturableError(RuntimeError):
    """A step does what cannot be part of a graph."""


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

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run a trajectory before it is recorded.

        This compiles and chooses all that is compiled or chosen at first use.
        """
        run()

    def begin(self) -> None:
        """Prepare a trajectory's replay, before its inputs are filled."""
        return

    def pad(self, rows: Tensor, given: Tensor) -> None:
        """Fill the rows of a buffer that no image needs."""
        rows.copy_(given[:1].expand_as(rows))

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory of what was recorded."""


class CudaRecorder(Recorder):
    """Records CUDA graphs in one memory pool.

    Later steps read a step's results at the address where it left them.

    Written after torch's documentation; no GPU has run it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, run: Callable[[], object]) -> None:
        # On the stream of the capture, as torch's documentation asks.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def record(self, step: Callable[[], Result]) -> tuple[Result, Replay]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on, such as one that decodes a preview.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = step()
        return result, graph.replay

    @property
    def nbytes(self) -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(each["total_size"] for each in segments if each["segment_pool_id"] == tuple(self._pool))


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


class _Operations(TorchDispatchMode):
    """The operations of one step, in order, with the tensors they read and wrote."""

    def __init__(self, recorder: HostRecorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotCapturableError(f"{func} draws numbers inside a step")
        return self.call(func, args, kwargs)

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run and record an operation, or a compiled function as one."""
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        known = [_storage(each) in self._recorder.storages for each in inputs]
        if any(known):
            if func in _READS_BACK or (func == aten.index.Tensor and _has_mask(inputs[1:])):
                raise NotCapturableError(f"{func} reads a value back inside a step")
            if foreign := [each for each, is_known in zip(inputs, known) if not is_known and each.ndim]:
                raise NotCapturableError(
                    f"{func} takes a tensor of shape {tuple(foreign[0].shape)} that is neither an input nor "
                    "made from one: it would be copied from the host inside a step"
                )
        elif func not in _MADE_ON_THE_DEVICE:
            return func(*args, **kwargs)  # on the host, such as a scheduler's own numbers
        result = func(*args, **kwargs)
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        before = {_storage(each) for each in inputs}
        made = [each for each in outputs if _storage(each) not in before]
        for each in made:
            self._recorder.keep(each)
        if made or not isinstance(func, torch._ops.OpOverload) or func._schema.is_mutable:  # no view
            self._calls.append((func, args, kwargs, outputs))
        return result

    def replay(self) -> None:
        for func, args, kwargs, outputs in self._calls:
            again = [each for each in tree_leaves(func(*args, **kwargs)) if isinstance(each, Tensor)]
            for recorded, new in zip(outputs, again, strict=True):
                if _storage(new) != _storage(recorded):
                    recorded.copy_(new)


def _has_mask(indices: Sequence[Tensor]) -> bool:
    return any(each.dtype == torch.bool for each in indices)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def call_recorded(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Call a compiled function, as one operation where the twin records."""
    mode = _get_current_dispatch_mode()
    if not isinstance(mode, _Operations):
        return function(*args)
    # As it was compiled: Dynamo guards on the modes that are there.
    with _disable_current_modes(), _pop_mode_temporarily():
        return mode.call(function, tuple(args), {})


def make_recorder(device: torch.device, known: Iterable[Tensor]) -> Recorder:
    """Return what records on a device."""
    return CudaRecorder(device) if device.type == "cuda" else HostRecorder(known)
