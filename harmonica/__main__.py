"""Run the command `harmonica`, which is `python -m harmonica`.

It hands its arguments to one of the commands in `harmonica.cli`.

harmonica sample --help
"""

import importlib
import sys

from harmonica.validation.extras import MissingExtra
from harmonica.version import __version__

COMMANDS = {
    "train": "train a router without Ray, alone or under torchrun",
    "sample": "sample with and without a router, timed",
    "apply": "put a router on a diffusers pipeline and make images",
    "convert": "convert a DiT between the public layout and a diffusers folder",
    "memory": "estimate the memory of training and of sampling",
}
USAGE = "\n".join(
    [
        "usage: harmonica COMMAND [OPTIONS]; harmonica COMMAND --help lists the options",
        "",
        *(f"  {name:8} {purpose}" for name, purpose in COMMANDS.items()),
        "",
    ]
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    The code is 2 if there is no such command, or an extra is missing.

    Args:
        arguments: the command's name and its options; those of the process if None.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if name == "--version":
        sys.stdout.write(f"{__version__}\n")
        return 0
    if name not in COMMANDS:
        sys.stderr.write(f"error: command is {name!r}: give one of {', '.join(COMMANDS)}\n")
        return 2
    try:
        module = importlib.import_module(f"harmonica.cli.{name}")
        code: int = module.main(rest)
    except MissingExtra as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
