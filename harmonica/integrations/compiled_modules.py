"""Tell which modules their owner has compiled.

That is by `nn.Module.compile`, or by a method of diffusers that calls it. A plan then keeps them compiled:
eager branches in place of compiled ones would cost more than a plan saves.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import nn

COMPILED_CALL = "_compiled_call_impl"
"""Attribute of a module that holds what its calls run, where it was compiled."""


def any_compiled(modules: Iterable[nn.Module]) -> bool:
    """Return whether any of the modules was compiled by its owner."""
    return any(vars(module).get(COMPILED_CALL) is not None for module in modules)


def allows_no_break(module: nn.Module) -> bool:
    """Return whether the module was compiled with `fullgraph=True`."""
    return any(context.fullgraph is True for context in _contexts(module))


def has_cuda_graphs(module: nn.Module) -> bool:
    """Return whether the module was compiled in a mode with CUDA graphs."""
    configs = [context.compiler_config for context in _contexts(module)]
    return any(isinstance(each, Mapping) and each.get("triton.cudagraphs") for each in configs)


def _contexts(module: nn.Module) -> list[Any]:
    """Return Dynamo's own record of how a module was compiled as a whole.

    It is of `torch.compile(module)` or of `module.compile()`.
    """
    call = vars(module).get(COMPILED_CALL)
    held = [cell.cell_contents for cell in getattr(call, "__closure__", None) or ()]
    found = (vars(module).get("dynamo_ctx"), *held)
    return [each for each in found if hasattr(each, "fullgraph") and hasattr(each, "compiler_config")]


@contextmanager
def uncompiled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run modules in this context as if their owner had not compiled them."""
    calls = [(module, vars(module).pop(COMPILED_CALL)) for module in modules if any_compiled([module])]
    try:
        yield
    finally:
        for module, call in calls:
            setattr(module, COMPILED_CALL, call)


def forget_graphs(modules: Iterable[nn.Module]) -> None:
    """Let compiled modules be compiled anew when they are called next.

    Graphs that were made while sub-modules followed a plan end at each of them, and would go on to be used.
    """
    forwards: list[Any] = [type(module).forward for module in modules if any_compiled([module])]
    codes: set[CodeType] = {forward.__code__ for forward in forwards if hasattr(forward, "__code__")}
    for code in codes:
        torch._dynamo.reset_code(code)  # type: ignore[attr-defined]
