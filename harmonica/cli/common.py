"""Parsing of options and printing, which the commands share."""

import contextlib
import io
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import TypeVar

import tyro
from rich.console import Console

from harmonica.validation.settings import SettingError

Settings = TypeVar("Settings")


def parse(arguments: list[str], presets: Mapping[str, Callable[[], Settings]], prog: str) -> Settings:
    """Return a preset with its overrides; the first preset if none is named.

    Raises:
        ValueError: unknown preset, or a value its field refuses. An unknown or malformed option ends
            the program with tyro's message and exit code 2.
    """
    name, rest = next(iter(presets)), arguments
    for place, given in enumerate(arguments):
        if given.split("=")[0] == "--preset":  # an option of earlier versions, which set the name alone
            value = given.partition("=")[2] or next(iter(arguments[place + 1 :]), "")
            wanted = value if value in presets else name
            raise ValueError(f"--preset is not an option: name the preset first, as in `{prog} {wanted}`")
    if arguments and not arguments[0].startswith("-"):
        name, rest = arguments[0], arguments[1:]
    elif arguments and arguments[0] in ("-h", "--help"):
        say(f"presets: {', '.join(presets)} (default {name}); settings of {name}:")
    if name not in presets:
        raise ValueError(f"preset is {name!r}: give one of {', '.join(presets)}")
    preset = presets[name]()
    return parse_settings(type(preset), rest, f"{prog} {name}", preset)


def parse_settings(
    kind: type[Settings], arguments: list[str], prog: str, default: Settings | None = None
) -> Settings:
    """Parse options with tyro, raising the settings' own error for a bad value.

    tyro prints such an error in a box, folded to the terminal's width, and exits; its own messages
    (unknown option, not a number) stay as they are.

    Args:
        kind: the class of the settings.
        default: the values of options that are not given; if None, the defaults of the class.

    Raises:
        SettingError: a value is refused.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if default is None:
                return tyro.cli(kind, args=arguments, prog=prog)
            return tyro.cli(kind, args=arguments, prog=prog, default=default)
    except SystemExit as exit_:
        refused = exit_.__context__
        while refused is not None:
            if isinstance(refused, SettingError):
                raise refused from None
            refused = refused.__context__
        sys.stderr.write(said.getvalue())
        raise


def say(text: str) -> None:
    """Print a line of progress."""
    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def fail(error: BaseException | str, *, code: int) -> int:
    """Print an error as one line on standard error, and return the exit code.

    Code 1 is a stage's own fault: its traceback is printed above the line.
    """
    if isinstance(error, BaseException) and code == 1:
        traceback.print_exception(error)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"error: {error}", markup=False)
    sys.stderr.flush()
    return code
