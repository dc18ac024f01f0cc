"""Keep in the host's memory what a backward pass needs of a long trajectory.

A tensor is copied when the forward pass saves it, and copied back when the backward pass reads it. The copies
are made on the stream that computes, from and to pinned memory, so that the process does not wait for them.
PyTorch's own `torch.autograd.graph.save_on_cpu` would also copy the model's weights, at each step anew, and
copy a cached value once for each forecast that it is part of.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

LEAST_BYTES = 2**20
"""A smaller tensor stays where it is: modulations and norms, thousands of which take little memory."""


class ActivationOffloading(saved_tensors_hooks):
    """A context in which saved tensors go to the host's memory.

    Saved are those that the backward pass needs.
    """

    def __init__(self, weights: Iterable[Tensor], *, least_bytes: int = LEAST_BYTES) -> None:
        """Begin with no copies.

        Args:
            weights: they stay where they are, as do the tensors that are views of them.
            least_bytes: smaller tensors stay where they are.
        """
        super().__init__(self._packed, self._unpacked)
        self._least_bytes = least_bytes
        self._weights = {StorageWeakRef(weight.untyped_storage()) for weight in weights}
        self._copies: weakref.WeakValueDictionary[tuple[Any, ...], Tensor] = weakref.WeakValueDictionary()

    def on_host(self, tensor: Tensor) -> Tensor:
        """Return a copy in the host's memory, which all who ask for this tensor share.

        A tensor that is there already, or small, is returned as it is.
        """
        if self._is_on_host(tensor) or tensor.nbytes < self._least_bytes:
            return tensor
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage in self._weights:
            return tensor
        # What is written in place between two saves is another tensor for the second.
        key = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        copy = self._copies.get(key)
        if copy is None:
            copy = torch.empty_like(tensor, device="cpu", requires_grad=False, pin_memory=tensor.is_cuda)
            self._copies[key] = copy.copy_(tensor.detach(), non_blocking=True)
        return copy

    def _is_on_host(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def _packed(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        return tensor.device, self.on_host(tensor)

    def _unpacked(self, packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)
