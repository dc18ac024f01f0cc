"""Record a forward's blocks as one branch.

The last block's output alone is kept. A plan of whole steps then keeps one value a call in place of one a
sub-module, as FreqCa does (arXiv 2510.08669), and a step of reuse runs no block at all. Forecasts are of the
last hidden state, and not of what each branch adds to it before its gate.
"""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from harmonica.integrations.recorded.kinds import BLOCKS
from harmonica.integrations.recorded.recording import Recording, Unit, block_modules, counted, filled
from harmonica.integrations.recorded.tensor_tags import tensors_of


@torch.no_grad()
def record_blocks(
    transformer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Recording:
    """Record one forward of a transformer, whose blocks are its units.

    Each block is taken to be read by the next one alone; a view tries whether that holds.

    Args:
        forward: the transformer's own; its other arguments are what a pipeline gives it.
    """
    recording, counts = Recording(), Counter[str]()
    running: list[Unit] = []
    handles: list[Any] = []

    def enter(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            count = counts[path]
            counts[path] += 1
            unit = Unit(f"{path}#{count}" if count else path, path, None, frozenset())
            unit.macs = -flops.get_total_flops() // 2
            running.append(unit)

        return hook

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        unit = running.pop()
        unit.macs += flops.get_total_flops() // 2
        unit.nbytes = sum(each.nbytes for each in tensors_of(output))
        if not running:  # a block inside of another one is a part of that
            recording.units.append(unit)

    with counted(transformer) as flops:
        try:
            for path, block in block_modules(transformer):
                handles += [block.register_forward_pre_hook(enter(path)), block.register_forward_hook(leave)]
            output = forward(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
    for before, unit in pairwise(recording.units):
        unit.reads = frozenset((before.name,))
    if recording.units:
        last = recording.units[-1]
        # Kept as a copy: whether the transformer goes on to write into it is not looked at.
        last.kind, last.reaches_output, last.is_overwritten = BLOCKS, True, True
    return filled(recording, output, flops)
