"""The difference, in words, between a run's settings and its first ones."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

_SHOWN = 3


def changed_settings(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    free: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> str:
    """Return the settings that differ, in words; "" if none does.

    An example is `compare.samples was 64 and is 32`.

    Args:
        before: as JSON has it, nested by section.
        now: the same of the settings that are given now.
        free: names that may differ, sections or single settings, such as `serve` and `train.num_workers`.
        defaults: the same of a run that changes nothing. What `before` does not have, a setting or a section,
            had its default, since the run is older.
    """
    others = list(_walk(before, now, "", free, defaults or {}))
    left_out = len(others) - _SHOWN
    more = f" and {left_out} more setting{'s differ' if left_out > 1 else ' differs'}" if left_out > 0 else ""
    return ", ".join(others[:_SHOWN]) + more


def _walk(
    before: Any, now: Mapping[str, Any], prefix: str, free: Collection[str], defaults: Mapping[str, Any]
) -> Iterator[str]:
    for key, value in now.items():
        name = f"{prefix}{key}"
        if name in free:
            continue
        default = defaults.get(key)
        old = before.get(key, default)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            below = default if isinstance(default, Mapping) else {}
            yield from _walk(old, value, f"{name}.", free, below)
        elif old != value:
            yield f"{name} was {_shown(old)} and is {_shown(value)}"


def _shown(value: Any) -> str:
    """Return a value as the message shows it.

    A section is shown as given or not given.
    """
    return "given" if isinstance(value, Mapping) else "not given" if value is None else repr(value)
