"""Check before a capture that steps do nothing that CUDA refuses in one.

A capture that fails cannot be undone: torch ends it by an error before its allocator has left the capture,
and what the process does on the device afterwards may fail. So steps are checked while they run as they are.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS_BACK = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
}


class NotCapturableError(RuntimeError):
    """A step does what cannot be part of a graph."""


class StepMode(TorchDispatchMode, ABC):
    """Sees the operations of steps, and compiled functions as one each."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a tensor's device and the like
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            # In inference mode such an operation comes whole, and what it reads would be out of sight.
            with self:
                return func.decompose(*args, **kwargs)
        return self.see(func, args, kwargs)

    @abstractmethod
    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation of the device."""

    def run_compiled(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run a compiled function as one operation."""
        # Without this mode: Dynamo guards on the modes that are there.
        with _disable_current_modes():
            return function(*args)


class CaptureCheck(StepMode):
    """Refuses operations that read values, copy from the host or draw numbers."""

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = tensors_in((args, kwargs))
        there = [each for each in inputs if not _is_host(each)]
        if there and reads_back(func, inputs):
            raise NotCapturableError(f"{func} reads a value back inside a step")
        host = [each for each in inputs if _is_host(each)]
        if there and any(each.ndim for each in host):
            raise NotCapturableError(f"{func} copies a tensor from the host inside a step")
        if func.overloadpacket in (aten._to_copy, aten.copy_):
            _check_copy(func, args, kwargs)
        result = func(*args, **kwargs)
        if all(map(_is_host, tensors_in(result))):
            return result
        if draws_numbers(func):
            raise NotCapturableError(f"{func} draws numbers inside a step")
        if func.overloadpacket == aten.lift_fresh:
            raise NotCapturableError(f"{func} copies numbers from the host inside a step")
        return result


def _check_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a copy between the host and the device, even of one number."""
    source = args[1] if func.overloadpacket == aten.copy_ else args[0]
    target = args[0].device if func.overloadpacket == aten.copy_ else kwargs.get("device")
    if target is None or torch.device(target).type == source.device.type:
        return
    what = "copies a tensor from the host" if _is_host(source) else "reads a value back"
    raise NotCapturableError(f"{func} {what} inside a step")


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors among arguments or results."""
    return [each for each in tree_leaves(tree) if isinstance(each, Tensor)]


def reads_back(func: Any, inputs: Sequence[Tensor]) -> bool:
    """Return whether an operation's result has to be read from the device."""
    is_masked = func == aten.index.Tensor and any(each.dtype == torch.bool for each in inputs[1:])
    return func in READS_BACK or is_masked


def draws_numbers(func: Any) -> bool:
    """Return whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in func.name()


def _is_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
