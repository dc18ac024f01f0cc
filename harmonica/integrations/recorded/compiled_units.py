"""Compile the forwards of a recorded transformer's branches, each as a graph.

A graph belongs to a class of modules. The module itself is an argument, and Dynamo's guards look at its
shapes, not at which one it is, so that all blocks share the graph.
"""

import types
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from harmonica.execution.compiled import limited


def compiled_unit(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a compiled form of a module's own forward.

    A forward that something wraps is returned as it is.
    """
    module = getattr(forward, "__self__", None)
    if not isinstance(module, nn.Module) or getattr(forward, "__func__", None) is not type(module).forward:
        return forward
    kind: Any = type(module)
    return partial(_compiled(kind), module)


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)


@lru_cache(maxsize=256)
def _compiled(kind: type) -> Callable[..., Any]:
    """Compile under a code object of the class's own, by which Dynamo counts graphs."""
    name = f"forward_of_{kind.__name__}"
    own = types.FunctionType(_forward.__code__.replace(co_name=name), _forward.__globals__, name)
    return torch.compile(own, **limited())
