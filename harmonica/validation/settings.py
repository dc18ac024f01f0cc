"""Classes of settings, whose values are checked when they are made.

A field says what it takes by its type and by `Field`, as in `rounds: Annotated[int, Field(ge=1)]`; pydantic
holds every value to that. Numbers are finite, and neither True nor "3" is a number. What several fields must
be together stands in the class's `__post_init__`, which runs once each field is found good by itself.

pydantic is installed with the commands. Where there is only torch, timm and safetensors, which suffices to
sample a DiT and to train its router from Python, settings are plain dataclasses: there the rules of
`__post_init__` alone are checked.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, dataclass_transform, get_args, get_origin

from harmonica.validation.setting_words import Cure, Wanted

try:
    import pydantic.dataclasses
    from pydantic import Field, Strict, ValidationError
except ModuleNotFoundError:
    pydantic = None  # type: ignore[assignment]
    Field = Strict = dict  # type: ignore[assignment, misc]
    ValidationError = ValueError  # type: ignore[assignment, misc]

__all__ = ["Count", "Cure", "Field", "Natural", "Positive", "SettingError", "require", "settings", "told"]

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
"""A number above 0, in seconds if the field's name ends in `_s`."""

_Class = TypeVar("_Class")
_NOT_OF_THE_BOUNDS = ("type", "parsing", "finite", "exact", "missing", "int_from_float")
"""Parts of the names of pydantic's errors about a value that is not such a number at all."""


class SettingError(ValueError):
    """A setting is refused; the message is `field is value: cure`.

    Args:
        message: the whole message.
        field: the field's name, if it is known by itself.
        reason: what follows the name in the message.
    """

    def __init__(self, message: str, field: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.field, self.reason = field, reason


def require(condition: bool, field_name: str, value: object, cure: str) -> None:
    """Refuse the value of a setting unless the condition holds.

    Raises:
        SettingError: the condition does not hold.
    """
    if not condition:
        reason = f"is {value!r}: {cure}"
        raise SettingError(f"{field_name} {reason}", field_name, reason)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def settings(section: str = "", *, slots: bool = True) -> Callable[[type[_Class]], type[_Class]]:
    """Return a class decorator that makes a class of checked settings.

    The class becomes a frozen dataclass with keyword fields.

    Args:
        section: the prefix of the fields' names on the command line, such as `train.sdt`.
    """

    def make(cls: type[_Class]) -> type[_Class]:
        plain = {"frozen": True, "kw_only": True, "slots": slots}
        if pydantic is None:
            return dataclasses.dataclass(frozen=True, kw_only=True, slots=slots)(cls)
        cls.__annotations__ = {name: _strict(one) for name, one in cls.__annotations__.items()}
        config = pydantic.ConfigDict(allow_inf_nan=False, extra="forbid")
        made = pydantic.dataclasses.dataclass(config=config, **plain)(cls)  # type: ignore[call-overload]
        checked = made.__init__

        @functools.wraps(checked)
        def __init__(self: Any, /, **given: Any) -> None:
            try:
                checked(self, **given)
            except ValidationError as error:
                first = error.errors()[0]
                if first["type"] in ("unexpected_keyword_argument", "missing"):
                    raise TypeError(
                        f"{cls.__name__} has no such setting or lacks one: {first['loc'][0]!r}"
                    ) from None
                raise _refusal(first, made, section, given) from None

        made.__init__ = __init__
        checking: type[_Class] = made
        return checking

    return make


def told(error: "ValidationError", cls: type) -> SettingError:
    """Return the error, in one sentence, for settings that pydantic refuses.

    The settings come from a dictionary, such as one read from YAML.

    Args:
        cls: the class of settings that they were for.
    """
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if not path and "error" in first.get("ctx", {}):  # of a validator, which has the words already
        return _refusal(first, cls, "", {})
    if not path:
        return SettingError(f"{cls.__name__} is {first['input']!r}: give settings by their names")
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return SettingError(f"{'.'.join(path)} is {first['input']!r}: there is no such setting, leave it out")
    depth = 0
    while depth < len(path) - 1:
        annotation = _annotations(cls).get(path[depth])
        inner, taken = _class_of(annotation), 1
        if inner is None and get_origin(kind := Wanted.of(annotation).kind) is dict:  # by names of the user's
            inner, taken = _class_of(get_args(kind)[1]), 2
        if inner is None or depth + taken >= len(path):
            break
        cls, depth = inner, depth + taken
    return _refusal({**first, "loc": path[depth:]}, cls, ".".join(path[:depth]), {})


def _refusal(error: Mapping[str, Any], cls: type, section: str, given: Mapping[str, Any]) -> SettingError:
    """Return one of pydantic's errors about `cls` as a sentence."""
    if "error" in error.get("ctx", {}):  # of __post_init__, which has the words already
        raised = error["ctx"]["error"]
        return raised if isinstance(raised, SettingError) else SettingError(str(raised))
    name = str(error["loc"][0])
    wanted = Wanted.of(_annotations(cls)[name])
    spelled = wanted.spelled or name
    field = f"{section}.{spelled}" if section else spelled
    is_other_type = any(word in error["type"] for word in _NOT_OF_THE_BOUNDS)
    if error["type"] == "finite_number" and wanted.bounds.keys() & {"lt", "le"}:
        is_other_type = False  # an upper bound says as much
    cure = wanted.words("seconds" if name.endswith("_s") else "", is_other_type)
    reason = f"is {given.get(name, error['input'])!r}: give {cure}"
    return SettingError(f"{field} {reason}", field, reason)


def _annotations(cls: type) -> dict[str, Any]:
    if dataclasses.is_dataclass(cls):
        return {field.name: field.type for field in dataclasses.fields(cls)}
    return {name: Annotated[one.annotation, one] for name, one in cls.model_fields.items()}  # type: ignore[attr-defined]


def _class_of(annotation: Any) -> type | None:
    """Return the class of settings that a field holds, if it holds one."""
    kind = Wanted.of(annotation).kind
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def _strict(annotation: Any) -> Any:
    """Make the numbers and switches of an annotation strict.

    Lists still make tuples, as YAML needs.
    """
    if annotation in (bool, int, float):
        return Annotated[annotation, Strict()]
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return Annotated[_strict(inner[0]), *inner[1:]]
    if origin is tuple:
        return tuple[tuple(_strict(one) for one in inner)]  # type: ignore[misc]
    if origin in (Union, UnionType):
        return Union[tuple(_strict(one) for one in inner)]  # noqa: UP007  # of as many as there are
    return annotation
