"""Make the views of a pipeline's transformers, or one for the time of a context."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from harmonica.integrations.recorded.kinds import KINDS
from harmonica.integrations.recorded.view import RecordedTransformer


def views_of(
    transformers: Sequence[nn.Module],
    forwards: Sequence[Callable[..., Any]],
    *,
    cacheable: Sequence[str],
    is_compiled: bool = False,
) -> list[RecordedTransformer]:
    """Return a view of each of a pipeline's transformers, with its own forward."""
    return [
        RecordedTransformer(transformer, forward, cacheable=cacheable, is_compiled=is_compiled)
        for transformer, forward in zip(transformers, forwards, strict=True)
    ]


@contextmanager
def recorded(
    transformer: nn.Module, *args: Any, cacheable: Sequence[str] = KINDS, **kwargs: Any
) -> Iterator[RecordedTransformer]:
    """Yield a transformer's view after one recorded forward; restore it at the end."""
    view = RecordedTransformer(transformer, transformer.forward, cacheable=cacheable)
    view.record(*args, **kwargs)
    try:
        yield view
    finally:
        view.close()
