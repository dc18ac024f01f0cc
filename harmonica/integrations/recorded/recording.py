"""Record one forward: the sub-modules that it calls, their costs and readers.

A unit is a call of a sub-module inside a block of a `nn.ModuleList`: one of a kind (`kinds`), or a leaf such
as a norm or a linear layer. Tags on tensors tell which units each one reads, and which reach the block's
output. From that graph `branches` finds branches.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from harmonica.integrations.compiled_modules import uncompiled
from harmonica.integrations.recorded.kinds import Declaration, RecordedKind, declaration_of, kind_of
from harmonica.integrations.recorded.tensor_tags import INPUT, tagged, tags_of, tensors_of, untagged


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of CPU attention, for which torch has no formula, by shapes."""
    return int(sdpa_flop_count(query, key, value))


_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@dataclass
class Unit:
    """Describes one call of a sub-module."""

    name: str
    """Path of the sub-module, with `#1` for its second call in one forward."""
    block: str
    """Path of the block that it is in."""
    kind: RecordedKind | None
    reads: frozenset[str]
    """Units whose outputs it is given, and `INPUT` where it is given the block's own input."""
    macs: int = 0
    """Multiply-accumulates of the whole call, for all rows of the batch."""
    nbytes: int = 0
    """Bytes of the tensors that it returned, for all rows of the batch."""
    reaches_output: bool = False
    """Whether its output, unread by another unit, is part of what the block returns."""
    is_overwritten: bool = False
    """Whether the block changes its output in place."""


@dataclass
class Recording:
    """Holds the units of one forward, in the order of calls, and its costs."""

    units: list[Unit] = field(default_factory=list)
    macs: int = 0
    """Multiply-accumulates of the forward, for all rows of the batch."""
    rows: int = 1
    """Rows of the batch: the length of what the forward returns."""
    output: Any = None
    """What the forward returned."""


def block_modules(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks of a transformer's outermost block lists, with their paths.

    A list whose modules have no sub-module of a kind, such as one of embedders, is no block list.
    """
    declared = declaration_of(transformer)

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if isinstance(child, nn.ModuleList | nn.ModuleDict):
                blocks = [(f"{path}.{key}", each) for key, each in child.named_children()]
                if any(isinstance(each, nn.ModuleList) for _, each in blocks):
                    yield from walk(child, f"{path}.")
                else:
                    yield from (one for one in blocks if _has_kind(one[1], declared))
            elif kind_of(name, declared) is None or _has_kind(child, declared):
                yield from walk(child, f"{path}.")

    yield from walk(transformer, "")


def _has_kind(block: nn.Module, declared: Declaration) -> bool:
    return any(kind_of(name.rpartition(".")[2], declared) for name, _ in block.named_modules() if name)


class _Recorder:
    """Hooks every module of the blocks, for one forward."""

    def __init__(self, transformer: nn.Module, flops: FlopCounterMode) -> None:
        self.flops = flops
        self._declared = declaration_of(transformer)
        self._blocks = dict(block_modules(transformer))
        self._handles: list[Any] = []
        self._counts = Counter[str]()
        self._stack: list[Unit] = []
        self._block = ""
        self._outputs: dict[str, tuple[Unit, list[tuple[Tensor, int]]]] = {}
        self.recording = Recording()

    def __enter__(self) -> "_Recorder":
        for path, block in self._blocks.items():
            self._hook(block, self._enter_block(path), self._leave_block)
            for name, module in block.named_modules(prefix=path):
                if module is not block:
                    # Inside of a layer with an adapter beside it is the model's own, and the adapter's.
                    is_leaf = next(module.children(), None) is None or hasattr(module, "base_layer")
                    kind = kind_of(name.rpartition(".")[2], self._declared)
                    if is_leaf or kind:
                        self._hook(module, self._enter_unit(module, name, kind), self._leave_unit(module))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after))

    def _enter_block(self, path: str) -> Callable[..., Any]:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
            self._block = path
            return tagged((args, kwargs), INPUT)

        return enter

    def _leave_block(self, _: nn.Module, __: Any, output: Any) -> Any:
        reached = tags_of(output)
        for name, (unit, tensors) in self._outputs.items():
            unit.reaches_output |= name in reached
            unit.is_overwritten = any(each._version != version for each, version in tensors)
        self._outputs.clear()
        self._block = ""
        return untagged(output)

    def _enter_unit(self, module: nn.Module, path: str, kind: RecordedKind | None) -> Callable[..., Any]:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if self._stack or not self._block:
                return None
            count = self._counts[path]
            self._counts[path] += 1
            unit = Unit(f"{path}#{count}" if count else path, self._block, kind, tags_of((args, kwargs)))
            unit.macs = -self.flops.get_total_flops() // 2
            self._stack.append(unit)
            self._running = module
            return untagged((args, kwargs))

        return enter

    def _leave_unit(self, module: nn.Module) -> Callable[..., Any]:
        def leave(_: nn.Module, __: Any, output: Any) -> Any:
            if not self._stack or self._running is not module:
                return None
            unit = self._stack.pop()
            unit.macs += self.flops.get_total_flops() // 2
            unit.nbytes = sum(each.nbytes for each in tensors_of(output))
            self.recording.units.append(unit)
            tensors = [(each, -1 if each.is_inference() else each._version) for each in tensors_of(output)]
            self._outputs[unit.name] = unit, [pair for pair in tensors if pair[1] >= 0]
            unit.is_overwritten = len(tensors) > len(self._outputs[unit.name][1])
            return tagged(output, unit.name)

        return leave


@torch.no_grad()
def record(transformer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Recording:
    """Record one forward of a transformer, whose output stays as it is.

    Args:
        forward: the transformer's own; its other arguments are what a pipeline gives it.
    """
    with counted(transformer) as flops, _Recorder(transformer, flops) as recorder:
        output = forward(*args, **kwargs)
    return filled(recorder.recording, output, flops)


@contextmanager
def counted(transformer: nn.Module) -> Iterator[FlopCounterMode]:
    """Count the FLOPs of what runs in this context.

    In it the transformer's modules run eagerly.
    """
    # Dynamo never again compiles a function that it has met under a counter.
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with uncompiled(transformer.modules()), counter as flops:
        yield flops


def filled(recording: Recording, output: Any, flops: FlopCounterMode) -> Recording:
    """Return a recording with what the forward returned and took."""
    recording.macs, recording.output = flops.get_total_flops() // 2, output
    first = next(tensors_of(output), None)
    is_list = isinstance(output, tuple | list) and isinstance(output[0], list)
    recording.rows = len(output[0]) if is_list else 1 if first is None else len(first)
    return recording
