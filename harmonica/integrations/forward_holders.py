"""Find where a module's forward is held.

That is the module, or one of the hooks that wrap it. accelerate's hooks keep the forward that they wrap in an
attribute of the module, and diffusers' (group offloading, casts) in a chain of references. What takes the
forward's place there is moved and cast by the hooks as the forward was.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

_OF_ACCELERATE = "_old_forward"
_OF_DIFFUSERS = "_diffusers_hook"


@dataclass(frozen=True)
class Holder:
    """An attribute that holds a forward of a module."""

    owner: Any
    name: str

    @property
    def value(self) -> Any:
        """Return what is held."""
        return getattr(self.owner, self.name)

    def set(self, module: nn.Module, value: Any) -> None:
        """Hold something else.

        The class's own forward is no attribute of the module itself.

        Args:
            module: whose forward it is.
        """
        if self.owner is module and self.name == "forward" and value == own_forward(module):
            vars(module).pop("forward", None)
        else:
            setattr(self.owner, self.name, value)
        # What inspection sees, and what would keep a plan alive that is gone.
        outermost = vars(module).get("forward")
        if self.owner is not module and isinstance(outermost, functools.partial):
            vars(outermost)["__wrapped__"] = value


def own_forward(module: nn.Module) -> types.MethodType:
    """Return the forward of the module's class."""
    return types.MethodType(type(module).forward, module)


def holders(module: nn.Module) -> list[Holder]:
    """Return all places of a module's forward, the innermost first."""
    found = [Holder(module, _OF_ACCELERATE)] if _OF_ACCELERATE in vars(module) else []
    registry = vars(module).get(_OF_DIFFUSERS)
    for reference in getattr(registry, "_fn_refs", ()):
        is_replaced = reference.original_forward is not None
        found.append(Holder(reference, "original_forward" if is_replaced else "forward"))
    return [*found, Holder(module, "forward")]


def holder_of(module: nn.Module, matches: Callable[[Any], bool]) -> Holder | None:
    """Return the innermost place whose forward matches, or None."""
    return next((holder for holder in holders(module) if matches(holder.value)), None)
