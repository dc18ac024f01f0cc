"""Put a plan's forward in the place of a transformer's, and take it off."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from harmonica.integrations.forward_holders import Holder, holder_of, own_forward
from harmonica.integrations.planned_forward import PlannedForward
from harmonica.integrations.recorded.trajectory import TransformerCall

STATE = "_harmonica"
"""Attribute of a transformer that has a plan."""
_END_OF_CALL = "_reset_stateful_cache"  # diffusers' pipelines call it when they have their images
_CONTEXT = "cache_context"  # names a step's calls, where a class has it


def unwrapped(transformer: nn.Module) -> nn.Module:
    """Return the module inside of torch.compile's."""
    return getattr(transformer, "_orig_mod", transformer)


def check_own_forward(module: nn.Module) -> Holder:
    """Return where the module's own forward is held.

    Raises:
        ValueError: something has taken its place.
    """
    own = own_forward(module)
    if (holder := holder_of(module, lambda held: held == own)) is None:
        raise ValueError(
            "transformer.forward is not the class's own, something wraps it: take that off, or load the "
            "transformer anew, apply, and put it on again"
        )
    return holder


@contextmanager
def in_place_of_forward(module: nn.Module, call: Any) -> Iterator[None]:
    """Let a call take the place of a module's forward in a context, inside of hooks.

    Raises:
        ValueError: something has taken its place already.
    """
    _place(module, call)
    try:
        yield
    finally:
        _restore(module, call)


def put_on(module: nn.Module, planned: PlannedForward | TransformerCall) -> None:
    """Let a plan's forward take the place of the module's."""
    _place(module, planned)
    for name, value in ((_END_OF_CALL, planned.end_of_call), (STATE, planned)):
        setattr(module, name, value)


def is_on(module: nn.Module, planned: Any) -> bool:
    """Return whether a plan's forward is in the place of the module's."""
    return holder_of(module, lambda held: held is planned) is not None


def take_off(module: nn.Module, planned: Any) -> None:
    """Restore what `put_on` replaced."""
    _restore(module, planned)
    for name in (_END_OF_CALL, STATE):
        vars(module).pop(name, None)


def _place(module: nn.Module, call: Any) -> None:
    check_own_forward(module).set(module, call)
    if isinstance(call, TransformerCall) and hasattr(type(module), _CONTEXT):
        setattr(module, _CONTEXT, call.cache_context)


def _restore(module: nn.Module, call: Any) -> None:
    if holder := holder_of(module, lambda held: held is call):
        holder.set(module, own_forward(module))
    vars(module).pop(_CONTEXT, None)
