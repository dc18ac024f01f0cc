"""Record steps on a CPU: what a CUDA graph does, operation by operation.

It replays into the recorded tensors, and refuses what a capture on CUDA refuses: values read back, and
tensors that come from the host.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from harmonica.execution.capture_check import (
    NotCapturableError,
    StepMode,
    draws_numbers,
    reads_back,
    tensors_in,
)
from harmonica.execution.recorders import Recorder, Replay, Result

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


class HostRecorder(Recorder):
    """Records on a CPU: slower than running the steps, and stricter than a CUDA graph.

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
