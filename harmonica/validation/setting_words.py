"""Descriptions of the values that a setting accepts, for errors.

They are made from the setting's annotation.
"""

import dataclasses
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

_NOUNS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text"}


class Cure(str):
    """The words of an error that say what to give.

    They are needed where type and bounds do not say it, as in `Annotated[int, Cure("0 for none")]`.
    """


@dataclasses.dataclass
class Wanted:
    """The values that a field accepts."""

    kind: Any = None
    """The type: int, float, bool, str, a class of settings, or another."""
    choices: tuple[Any, ...] = ()
    bounds: dict[str, Any] = dataclasses.field(default_factory=dict)
    each: "Wanted | None" = None
    """The values that a tuple's elements accept; None if it is no tuple."""
    cure: str = ""
    spelled: str = ""
    """The option's name on the command line, if it is not the field's."""

    @classmethod
    def of(cls, annotation: Any) -> "Wanted":
        """Return the accepted values of an annotation, without the None of unions."""
        origin, inner = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            found = cls.of(inner[0])
            for extra in inner[1:]:
                found._take(extra)
            return found
        if origin is Literal:
            return cls(choices=inner)
        if origin is tuple:
            return cls(kind=tuple, each=cls.of(inner[0]))
        if origin in (Union, UnionType):
            parts = [cls.of(one) for one in inner if one is not NoneType]
            parts[0].choices = tuple(choice for part in parts for choice in part.choices)
            return parts[0]
        return cls(kind=annotation)

    def _take(self, extra: Any) -> None:
        if isinstance(extra, Cure):
            self.cure = extra
        for one in getattr(extra, "metadata", None) or []:  # of pydantic's Field
            if isinstance(one, Cure):
                self.cure = one
            bounds = ("gt", "ge", "lt", "le", "min_length", "max_length")
            self.bounds |= {name: getattr(one, name) for name in bounds if hasattr(one, name)}
        name = getattr(extra, "name", None)  # of tyro.conf.arg
        self.spelled = name if isinstance(name, str) else self.spelled

    def words(self, unit: str, is_other_type: bool) -> str:
        """Return the words that follow "give" in an error.

        Args:
            is_other_type: whether the value is of another type, so that the words have to name the type.
        """
        if self.cure:
            return self.cure
        if self.choices:
            return _one_of(self.choices)
        if self.each is not None:
            return self._words_of_many()
        if self.kind not in _NOUNS:
            return f"a {getattr(self.kind, '__name__', self.kind)}"
        number = unit or "a number"
        noun = _NOUNS[self.kind] + (f" of {unit}" if unit else "") if is_other_type else number
        span = _range(self.bounds)
        if span.startswith(("above", "between")):
            return f"{noun} {span}"
        return f"{noun}, {span}" if span and is_other_type else span or noun

    def _words_of_many(self) -> str:
        each, bounds = self.each, self.bounds
        assert each is not None
        if each.choices:
            return f"some of {', '.join(map(str, each.choices))}"
        least, most = bounds.get("min_length", 0), bounds.get("max_length")
        count = f"at most {most} " if most else "one or more " if least else ""
        noun = {int: "whole numbers", float: "numbers"}.get(each.kind, "texts")
        span = _range(each.bounds)
        return f"{count}{noun}" + (
            f" {span if span.startswith(('above', 'between')) else f'of {span}'}" if span else ""
        )


def _one_of(choices: tuple[Any, ...]) -> str:
    if len(choices) == 2:
        return f"{choices[0]} or {choices[1]}"
    return f"one of {', '.join(map(str, choices))}"


def _range(bounds: Mapping[str, Any]) -> str:
    gt, ge, lt, le = (_shown(bounds.get(name)) for name in ("gt", "ge", "lt", "le"))
    if gt:
        return f"between {gt} and {lt}" if lt else f"above {gt}, at most {le}" if le else f"above {gt}"
    if ge:
        return f"{ge} to below {lt}" if lt else f"{ge} to {le}" if le else f"{ge} or more"
    return f"at most {le}" if le else ""


def _shown(bound: float | None) -> str:
    if bound is None:
        return ""
    return str(int(bound)) if bound == int(bound) and abs(bound) < 1e15 else f"{bound:g}"
