"""Settings of a run that are not those it was started with, in words that show these alone."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

_SHOWN = 3


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()) -> str:
    """What differs, such as `compare.samples was 64 and is 32`; "" where nothing does.

    Args:
        before: as JSON has it, nested by section.
        now: the same of the settings that are given now.
        free: names that may differ, sections or single settings, such as `serve` and `train.num_workers`.
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
    """Of a section that was not given at all, no more than that."""
    return "given" if isinstance(value, Mapping) else "not given" if value is None else repr(value)
