"""Bytes of the tensors that a piece of code has alive at its worst moment, on any device."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harmonica.execution.offloading import ActivationOffloading
from harmonica.training import memory_savings
from harmonica.training.memory_savings import NO_SAVINGS, MemorySavings

SAVINGS = {
    "none": NO_SAVINGS,
    "recomputed": MemorySavings(recompute=True),
    "offloaded": MemorySavings(offload=True),
    "both": MemorySavings(recompute=True, offload=True),
}


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

    def forget(self, storage: torch.UntypedStorage) -> None:
        """Count a storage no longer, which is in another memory."""
        self.now -= self._bytes[storage._cdata]
        self._bytes[storage._cdata] = 0


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


def peaks_in_both(model: nn.Module, run: Callable[[], object]) -> tuple[int, int]:
    """Most bytes at a time of the device, and bytes that went to the host, the model's weights not counted.

    On a machine that has one memory: what offloading keeps on the host does not count as the device's.
    """
    live = Live(model)
    storages: set[StorageWeakRef] = set()
    sizes: list[int] = []

    class Offloading(ActivationOffloading):
        def __init__(self, weights: Iterable[Tensor]) -> None:
            super().__init__(weights, least_bytes=0)

        def on_host(self, tensor: Tensor) -> Tensor:
            copy = super().on_host(tensor)
            if copy is not tensor and not self._is_on_host(copy):
                storages.add(StorageWeakRef(copy.untyped_storage()))
                sizes.append(copy.untyped_storage().nbytes())
                live.forget(copy.untyped_storage())
            return copy

        def _is_on_host(self, tensor: Tensor) -> bool:
            return StorageWeakRef(tensor.untyped_storage()) in storages

        def _packed(self, tensor: Tensor) -> Any:
            return self._is_on_host(tensor), self.on_host(tensor)

        def _unpacked(self, packed: Any) -> Tensor:
            was_on_host, tensor = packed
            return tensor if was_on_host or not self._is_on_host(tensor) else tensor.clone()

    with mock.patch.object(memory_savings, "ActivationOffloading", Offloading), live:
        run()
    return live.peak, sum(sizes)
