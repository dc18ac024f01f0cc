"""Tag tensors with the sub-modules that they came from, during a recording."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree

INPUT = "input"
"""Tag of what a block is given, as against what its sub-modules return."""


class TaggedTensor(Tensor):
    """Carries names of sub-modules on to whatever is computed from the tensor."""

    tags: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        tags = tags_of((args, kwargs))
        output = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        for each in tensors_of(output):
            if isinstance(each, TaggedTensor):
                each.tags = each.tags | tags
        return output


def tensors_of(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    return (leaf for leaf in _pytree.tree_leaves(values) if isinstance(leaf, Tensor))


def tags_of(values: Any) -> frozenset[str]:
    """Return the tags of all tensors in nested tuples, lists and dicts."""
    found = [each.tags for each in tensors_of(values) if isinstance(each, TaggedTensor)]
    return frozenset[str]().union(*found)


def tagged(values: Any, tag: str) -> Any:
    """Return the values with all tensors of real numbers tagged by `tag` alone."""

    def tag_one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        twin = untagged(leaf).as_subclass(TaggedTensor)
        twin.tags = frozenset((tag,))
        return twin

    return _pytree.tree_map(tag_one, values)


def untagged(values: Any) -> Any:
    """Return the values as plain tensors."""

    def plain(leaf: Any) -> Any:
        return leaf.as_subclass(Tensor) if isinstance(leaf, TaggedTensor) else leaf

    return _pytree.tree_map(plain, values)
