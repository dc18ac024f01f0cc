"""Stand in for values that nothing reads, such as norms of reused branches.

A block's forward goes on as it is, so it scales and shifts the stand-in, reshapes it and hands it to the
branch, which ignores it. Each of those operations computes a shape and no values.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

_META = torch.device("meta")


class SkippedTensor(Tensor):
    """Has the shape, precision and device of a tensor, and no values."""

    shape_only: Tensor

    @staticmethod
    def __new__(cls: type[Any], shape_only: Tensor, device: torch.device) -> "SkippedTensor":
        skipped: SkippedTensor = Tensor._make_wrapper_subclass(
            cls,
            shape_only.shape,
            strides=shape_only.stride(),
            dtype=shape_only.dtype,
            device=device,
        )
        skipped.shape_only = shape_only
        return skipped

    @classmethod
    @torch.compiler.disable  # Dynamo would compile it for every shape that it meets
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        devices = [each.device for each in _pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]

        def to_meta(leaf: Any) -> Any:
            if isinstance(leaf, SkippedTensor):
                return leaf.shape_only
            if isinstance(leaf, Tensor):
                return leaf.to(_META)
            return _META if isinstance(leaf, torch.device) else leaf

        output = func(*_pytree.tree_map(to_meta, args), **_pytree.tree_map(to_meta, dict(kwargs or {})))
        return skipped_like(output, devices[0])


def skipped_like(values: Any, device: torch.device | None = None) -> Any:
    """Return stand-ins for all tensors in nested tuples, lists and dicts."""

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return SkippedTensor(leaf.detach().to(_META), device or leaf.device)

    return _pytree.tree_map(stand_in, values)


def has_skipped(values: Any) -> bool:
    """Return whether any tensor in the values is a stand-in."""
    return any(isinstance(leaf, SkippedTensor) for leaf in _pytree.tree_leaves(values))
