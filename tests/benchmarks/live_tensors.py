"""Bytes of the tensors that a piece of code has alive at its worst moment, on any device."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Bytes of the tensors alive that were made since, and the most there were."""

    def __init__(self, *known: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._bytes = {p.untyped_storage()._cdata: 0 for model in known for p in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._bytes:
            self._bytes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._bytes.pop(key)


def peak_of(model: nn.Module, run: Callable[[], object]) -> int:
    """Most bytes at a time, the model's weights not counted; on a GPU, of what its allocator gave."""
    device = next(model.parameters()).device
    if device.type == "cuda":  # what is compiled does not pass by the dispatcher
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    live = Live(model)
    with live:
        run()
    return live.peak
