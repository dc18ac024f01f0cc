"""The difference between a run's settings and those that it was started with, in words."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

_SHOWN = 3


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()) -> str:
    """Return what differs, such as `compare.samples was 64 and is 32`; "" if nothing does.

    Args:
        before: the earlier settings as JSON has them, nested by section.
        now: the present settings, likewise.
        free: sections or single settings that may differ, such as `serve` and `train.num_workers`.
    """
    others = list(_walk(before, now, "", free))
    left_out = len(others) - _SHOWN
    more = f" and {left_out} more setting{'s differ' if left_out > 1 else ' differs'}" if left_out > 0 else ""
    return ", ".join(others[:_SHOWN]) + more


def _walk(before: Any, now: Mapping[str, Any], prefix: str, free: Collection[str]) -> Iterator[str]:
    for key, value in now.items():
        name = f"{prefix}{key}"
        if name in free:
            continue
        old = before.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            yield from _walk(old, value, f"{name}.", free)
        elif old != value:
            yield f"{name} was {_shown(old)} and is {_shown(value)}"


def _shown(value: Any) -> str:
    """Return a value as the message shows it; for a missing section, just that it was not given."""
    return "given" if isinstance(value, Mapping) else "not given" if value is None else repr(value)
