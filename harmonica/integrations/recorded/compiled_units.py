"""Compile the forwards of a recorded transformer's branches, each as a graph.

A graph belongs to a class of modules. The module itself is an argument, and Dynamo's guards look at its
shapes, not at which one it is, so that all blocks share the graph.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from harmonica.execution.compiled import compiled_for
from harmonica.integrations.recorded.recording import block_modules


def compiled_unit(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a compiled form of a module's own forward.

    A forward that something wraps is returned as it is.
    """
    module = getattr(forward, "__self__", None)
    if not isinstance(module, nn.Module) or getattr(forward, "__func__", None) is not type(module).forward:
        return forward
    kind: Any = type(module)  # mypy takes no metaclass for hashable
    return partial(compiled_for(_forward, kind, fullgraph=False), module)


def compile_blocks(transformer: nn.Module) -> None:
    """Compile each block of a transformer.

    diffusers' `compile_repeated_blocks` does so too, where it names the blocks of a class.
    """
    for _, block in block_modules(transformer):
        block.compile()


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)
