"""Replace the forwards of a transformer's units while a pass runs.

Outside of a pass they are the module's own forward. A block that its owner has compiled is replaced as a
whole call, around the compiled one: inside, Dynamo would leave it out of its graphs.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from harmonica.integrations.compiled_modules import COMPILED_CALL, any_compiled, forget_graphs
from harmonica.integrations.forward_holders import Holder, holders
from harmonica.integrations.recorded.compiled_units import compiled_unit


class UnitPass(Protocol):
    """Decides about the units of one forward, under a plan or in training."""

    def run(self, unit: str, forward: partial[Any]) -> Any:
        """Return a unit's output; `forward` computes it from its arguments."""
        ...


class Switchboard:
    """Holds the running pass and counts each module's calls in it."""

    def __init__(self) -> None:
        self.running: UnitPass | None = None
        self._counts = Counter[str]()

    @contextmanager
    def during(self, unit_pass: UnitPass) -> Iterator[None]:
        """Let the units follow a pass inside this context."""
        self.running, before = unit_pass, self.running
        self._counts.clear()
        try:
            yield
        finally:
            self.running = before
            self._counts.clear()

    def name_of_call(self, path: str) -> str:
        """Return the unit that a call of the module at `path` is."""
        count = self._counts[path]
        self._counts[path] += 1
        return f"{path}#{count}" if count else path

    def __getstate__(self) -> dict[str, Any]:
        return {"running": None, "_counts": Counter[str]()}


class UnitCall:
    """Replaces one module's forward.

    What a block does with its units is decided at each call, so torch.compile leaves every unit out of the
    block's graphs; it may be a graph of its own instead.
    """

    def __init__(
        self, path: str, forward: Callable[..., Any], board: Switchboard, *, is_compiled: bool = False
    ) -> None:
        """Replace a forward.

        Args:
            is_compiled: compute it as one graph, which modules of one class and shape share.
        """
        self.path, self.forward, self.board = path, forward, board
        self._is_compiled = is_compiled
        self._compiled: Callable[..., Any] | None = None

    @property
    def compute(self) -> Callable[..., Any]:
        """Return what computes the module."""
        if not self._is_compiled:
            return self.forward
        if self._compiled is None:
            self._compiled = compiled_unit(self.forward)
        return self._compiled

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_compiled": None}

    def __get__(self, *_: Any) -> "UnitCall":
        """Return itself when something binds it, as diffusers' hooks do."""
        return self

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = self.board.running
        if running is None:
            return self.compute(*args, **kwargs)
        return running.run(self.board.name_of_call(self.path), partial(self.compute, *args, **kwargs))


class ReplacedUnits:
    """The forwards of a transformer's units that follow the passes of one view."""

    def __init__(self, transformer: nn.Module, *, is_compiled: bool, are_blocks: bool) -> None:
        """Replace nothing yet.

        Args:
            is_compiled: compute each of them as a graph of torch.compile.
            are_blocks: they are called by the transformer itself, and may be compiled by their owner, now or
                later.
        """
        self.board = Switchboard()
        self._transformer, self._is_compiled, self._are_blocks = transformer, is_compiled, are_blocks
        self._modules: dict[str, nn.Module] = {}

    def put_on(self, paths: Iterable[str]) -> None:
        """Replace the forwards of the modules at these paths."""
        self._modules = {path: self._transformer.get_submodule(path) for path in paths}
        self._replace_missing()

    def follow(self) -> None:
        """Replace the forwards of modules that have come to the paths since."""
        for path, module in self._modules.items():
            if (now := self._transformer.get_submodule(path)) is not module:
                _take_off(module, self.board)
                self._modules[path] = now
        self._replace_missing()

    def keep_on(self) -> None:
        """Replace the forwards of blocks again that are no longer replaced.

        Blocks may have been compiled since, and in a copy they are as they were before.
        """
        if self._are_blocks:
            self._replace_missing()

    def _replace_missing(self) -> None:
        missing = {path: module for path, module in self._modules.items() if not self._is_on(module)}
        if not missing:
            return
        is_compiled = self._is_compiled or any_compiled(self._transformer.modules())
        for path, module in missing.items():
            _take_off(module, self.board)  # it would be inside of what was compiled since
            slot = self._slot(module)
            slot.set(module, UnitCall(path, slot.value, self.board, is_compiled=is_compiled))

    def _is_on(self, module: nn.Module) -> bool:
        """Return whether the module's calls follow the passes."""
        slot = self._slot(module)
        if slot.name == COMPILED_CALL:
            return _has_call(slot.value, self.board)
        inside = any(_has_call(holder.value, self.board) for holder in holders(module))
        return inside or _wraps_call(module, self.board)

    def _slot(self, module: nn.Module) -> Holder:
        """Return the attribute to replace.

        It is the outermost one, since reuse needs no hook to run.
        """
        if self._are_blocks and vars(module).get(COMPILED_CALL) is not None:
            return Holder(module, COMPILED_CALL)
        innermost = holders(module)[0]
        return innermost if innermost.owner is module else Holder(module, "forward")

    def take_off(self) -> None:
        """Restore the forwards.

        Raises:
            ValueError: something wraps one of them.
        """
        for name, module in self._transformer.named_modules():
            if _wraps_call(module, self.board) and not any(
                _has_call(holder.value, self.board) for holder in holders(module)
            ):
                raise ValueError(
                    f"transformer.{name}.forward is wrapped since the plan came: take that off first, then "
                    "harmonica.remove"
                )
        modules = list(self._transformer.modules())
        slots = {slot for module in modules for slot in _take_off(module, self.board)}
        if slots - {COMPILED_CALL}:
            forget_graphs(modules)


def _take_off(module: nn.Module, board: Switchboard) -> list[str]:
    """Put back what a board's calls have replaced, and return the attributes' names."""
    compiled = [Holder(module, COMPILED_CALL)] if COMPILED_CALL in vars(module) else []
    found = [each for each in (*compiled, *holders(module)) if _has_call(each.value, board)]
    for holder in found:
        holder.set(module, _without(holder.value, board))
    return [holder.name for holder in found]


def _has_call(call: Any, board: Switchboard) -> bool:
    """Return whether a board's call is among those around a forward.

    Several views of one transformer have a board and calls each.
    """
    while isinstance(call, UnitCall):
        if call.board is board:
            return True
        call = call.forward
    return False


def _without(call: Any, board: Switchboard) -> Any:
    """Return what a board's call is around, inside of other boards' calls."""
    if not isinstance(call, UnitCall):
        return call
    if call.board is board:
        return call.forward
    call.forward, call._compiled = _without(call.forward, board), None
    return call


def _wraps_call(module: nn.Module, board: Switchboard) -> bool:
    """Return whether a wrapper of the module's forward has a board's call inside."""
    wrapped = vars(module).get("forward")
    return _has_call(getattr(wrapped, "__wrapped__", None), board)
