"""Put a plan's forward in the place of a transformer's, and take it off."""

import types
from typing import Any

from torch import nn

from harmonica.integrations.planned_forward import PlannedForward
from harmonica.integrations.recorded.trajectory import TransformerCall

STATE = "_harmonica"
"""Attribute of a transformer that has a plan."""
_END_OF_CALL = "_reset_stateful_cache"  # diffusers' pipelines call it when they have their images
_CONTEXT = "cache_context"  # names a step's calls, where a class has it
_HOOKED = "_old_forward"  # where accelerate's hooks keep the forward that they wrap


def slot(module: nn.Module) -> str:
    """Return the attribute that holds the module's own forward."""
    return _HOOKED if _HOOKED in vars(module) else "forward"


def unwrapped(transformer: nn.Module) -> nn.Module:
    """Return the module inside of torch.compile's."""
    return getattr(transformer, "_orig_mod", transformer)


def own_forward(module: nn.Module) -> types.MethodType:
    """Return the forward of the module's class."""
    return types.MethodType(type(module).forward, module)


def check_own_forward(module: nn.Module) -> None:
    """Check that nothing has taken the place of the module's forward.

    Raises:
        ValueError: something has.
    """
    if getattr(module, slot(module)) != own_forward(module):
        raise ValueError(
            "transformer.forward is not the class's own, something wraps it: take that off, or load the "
            "transformer anew, apply, and put it on again"
        )


def put_on(module: nn.Module, planned: PlannedForward | TransformerCall) -> None:
    """Let a plan's forward take the place of the module's."""
    for name, value in ((slot(module), planned), (_END_OF_CALL, planned.end_of_call), (STATE, planned)):
        setattr(module, name, value)
    if isinstance(planned, TransformerCall) and hasattr(type(module), _CONTEXT):
        setattr(module, _CONTEXT, planned.cache_context)


def take_off(module: nn.Module) -> None:
    """Restore what `put_on` replaced."""
    attributes: dict[str, Any] = vars(module)
    if _HOOKED in attributes:
        setattr(module, _HOOKED, own_forward(module))
    else:
        del module.forward
    for name in (_END_OF_CALL, STATE, _CONTEXT):
        if name in attributes:
            delattr(module, name)
