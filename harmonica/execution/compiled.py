"""The runner that compiles each branch whole.

Norm, modulation, cast, sub-layer, gate and addition are one graph.

A graph belongs to a kind of branch. The branch itself is an argument, and Dynamo's guards look at its class,
at the shapes of its weights and at what its modules are made of, not at which one it is: so all blocks of a
model, and all models of its shape, share the graph. Another precision, grad mode or TF32 setting is another
graph; the batch is one graph for the first size and one more for all others but 1 (two where a modulation
lies at the beginning of its storage).
Shapes: N batch, L tokens, D width.
"""

import inspect
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from harmonica.execution import branch_functions as functions
from harmonica.execution.eager import Addition, EagerRunner
from harmonica.execution.recorders import call_recorded
from harmonica.execution.values import KeptValues, Scalars, ValueStore
from harmonica.models.base import Branch

GRAPHS_PER_KIND = 64
"""Graphs of one function and kind of branch: shapes, precisions, grad modes. More are an error."""
_VALUES_AT_ONCE = 4
"""Values that one kernel adds to the hidden state; each number of them is a graph of its own."""
_SUMS_AT_ONCE = 2
_Reused = tuple[Tensor | None, KeptValues]  # gate and values of a reused branch


class RecompileLimitError(RuntimeError):
    """A compiled branch met more different inputs than it may have graphs."""


_HAS_LIMIT = "recompile_limit" in inspect.signature(torch.compile).parameters  # torch 2.13


@lru_cache(maxsize=256)
def compiled_for(
    function: Callable[..., Any], kind: str | type, *, fullgraph: bool = True
) -> Callable[..., Any]:
    """Compile a function under a code object of a kind's own.

    Dynamo counts graphs by code objects.

    Args:
        kind: what is compiled apart from other kinds.
        fullgraph: a recompile beyond the limit raises; without, it runs eagerly from then on.
    """
    plain = cast(types.FunctionType, function)
    named = kind.__name__ if isinstance(kind, type) else kind
    name = f"{plain.__name__}_{named}".replace(" ", "_")
    own = types.FunctionType(plain.__code__.replace(co_name=name), plain.__globals__, name)
    limit: dict[str, Any] = {"recompile_limit": GRAPHS_PER_KIND} if _HAS_LIMIT else {}
    return torch.compile(own, fullgraph=fullgraph, **limit)


class _Reasons(logging.Handler):
    """Takes down why Dynamo compiles again, which its error does not say."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _call(function: Callable[..., Any], kind: str, *args: Any) -> Any:
    """Run a function's compiled form.

    Raises:
        RecompileLimitError: it has all the graphs that it may have.
    """
    compiled = compiled_for(function, kind)
    try:
        return _call_within_limit(compiled, args)
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        reason = _why(compiled, args)
        raise RecompileLimitError(
            f"the compiled branches of kind {kind} have {GRAPHS_PER_KIND} graphs and these inputs need "
            f"another: {reason}. Keep precision, grad mode and TF32 as they are, or set model.execution eager"
        ) from error


def _call_within_limit(compiled: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return call_recorded(compiled, args)
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        if _HAS_LIMIT:
            raise
        # Before torch 2.13 the limit is one of the process. It is raised for the call that needs another
        # graph: doing so for every call would take longer than some calls.
        with torch._dynamo.config.patch(recompile_limit=GRAPHS_PER_KIND):
            return call_recorded(compiled, args)


def _why(compiled: Callable[..., Any], args: tuple[Any, ...]) -> str:
    logger, reasons = logging.getLogger("torch._dynamo.convert_frame"), _Reasons()
    logger.addHandler(reasons)
    try:
        compiled(*args)
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        pass
    finally:
        logger.removeHandler(reasons)
    said = [
        line.split(":", 1)[1].strip()
        for text in reasons.texts
        for line in text.splitlines()
        if "last reason" in line
    ]
    return said[0] if said else "TORCH_LOGS=recompiles says why"


def _kind_of(branch: Branch) -> str:
    inner = getattr(branch, "branch", branch)
    return f"{type(inner).__name__} {branch.kind}"


class CompiledRunner(EagerRunner):
    """Runs each branch as one compiled graph."""

    def compute(
        self, branch: Branch, index: int, hidden_NLD: Tensor, conditioning: Any
    ) -> tuple[Tensor, Tensor]:
        if branch.parts:  # each of them is a graph, which others of its kind share
            return super().compute(branch, index, hidden_NLD, conditioning)
        gate, inputs = branch.gate(conditioning), branch.inputs(conditioning)
        hidden_NLD, y_NLD = _call(functions.compute, _kind_of(branch), branch, hidden_NLD, gate, inputs)
        return self.run_all(branch.always, hidden_NLD, conditioning), y_NLD

    def compute_and_add(
        self,
        branch: Branch,
        index: int,
        hidden_NLD: Tensor,
        conditioning: Any,
        additions: Sequence[Addition],
        scalars: Scalars,
    ) -> Tensor:
        first, *others = _arguments(additions, scalars)
        if not first[0]:
            return self.compute(branch, index, hidden_NLD, conditioning)[0]
        if branch.parts:
            hidden_NLD, y_NLD = self.compute(branch, index, hidden_NLD, conditioning)
            for each in (first, *others):
                _call(functions.add_to, "any", *each, y_NLD)
            return hidden_NLD
        gate, inputs, kind = branch.gate(conditioning), branch.inputs(conditioning), _kind_of(branch)
        hidden_NLD, y_NLD = _call(functions.compute_and_add, kind, branch, hidden_NLD, gate, inputs, *first)
        for each in others:
            _call(functions.add_to, "any", *each, y_NLD)
        return self.run_all(branch.always, hidden_NLD, conditioning)

    def reuse(
        self,
        branches: Sequence[Branch],
        indices: range,
        hidden_NLD: Tensor,
        conditioning: Any,
        store: ValueStore,
        step: int,
    ) -> Tensor:
        device = hidden_NLD.device
        run: list[_Reused] = []
        for index in indices:
            branch = branches[index]
            run.append((branch.gate(conditioning), store.kept(index, step)))
            if branch.always or index == indices[-1]:
                for part in _parts(run):
                    gates = tuple(gate for gate, _ in part)
                    values = tuple(kept.values for _, kept in part)
                    factors = tuple(_factors(kept, store.scalars, device) for _, kept in part)
                    hidden_NLD = _call(functions.reuse, "any", hidden_NLD, gates, values, factors)
                hidden_NLD, run = self.run_all(branch.always, hidden_NLD, conditioning), []
        return hidden_NLD

    def mix(
        self,
        branch: Branch,
        index: int,
        hidden_NLD: Tensor,
        conditioning: Any,
        store: ValueStore,
        step: int,
        score: Tensor,
    ) -> tuple[Tensor, Tensor]:
        gate, inputs, kept = branch.gate(conditioning), branch.inputs(conditioning), store.kept(index, step)
        factors = _factors(kept, store.scalars, hidden_NLD.device)
        hidden_NLD, y_NLD = _call(
            *(
                functions.mix_in,
                _kind_of(branch),
                branch,
                hidden_NLD,
                gate,
                inputs,
                kept.values,
                factors,
                score,
            )
        )
        return self.run_all(branch.always, hidden_NLD, conditioning), y_NLD

    def run_all(self, branches: Sequence[Branch], hidden_NLD: Tensor, conditioning: Any) -> Tensor:
        for index, branch in enumerate(branches):
            hidden_NLD, _ = self.compute(branch, index, hidden_NLD, conditioning)
        return hidden_NLD


def _factors(kept: KeptValues, scalars: Scalars, device: torch.device) -> tuple[Tensor, ...]:
    if kept.coefficients == (1.0,):
        return ()
    return tuple(scalars.of(each, device) for each in kept.coefficients)


def _parts(run: Sequence[_Reused]) -> Iterator[Sequence[_Reused]]:
    """Divide a run of branches so that few graphs serve all of them.

    Parts have 4, 2 or 1 branches, alike in their values and gates.
    """
    likeness = [(gate is None, len(kept.values)) for gate, kept in run]
    first = 0
    while first < len(run):
        size = 1
        while (
            2 * size * likeness[first][1] <= _VALUES_AT_ONCE
            and likeness[first : first + 2 * size] == likeness[first : first + 1] * 2 * size
        ):
            size *= 2
        yield run[first : first + size]
        first += size


def _arguments(
    additions: Sequence[Addition], scalars: Scalars
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor | None, ...], tuple[Tensor, ...]]]:
    """Yield totals, gates and weights of some additions at a time, at least once."""
    for first in range(0, max(1, len(additions)), _SUMS_AT_ONCE):
        some = additions[first : first + _SUMS_AT_ONCE]
        yield (
            tuple(each.total_NLD for each in some),
            tuple(each.gate_N1D for each in some),
            tuple(scalars.of(each.weight, each.total_NLD.device) for each in some),
        )
