"""Checks that optional dependencies are installed.

The errors name the extra that installs them.
"""

import importlib.util

DISTRIBUTION = "harmonica-ray"


class MissingExtra(ModuleNotFoundError):
    """A module is missing that one of the distribution's extras installs."""


def need(module: str, *, extra: str) -> None:
    """Check that a module is installed, without importing it.

    Args:
        module: a top-level name, such as `diffusers`.
        extra: the extra in `pyproject.toml` that installs it.

    Raises:
        MissingExtra: the module is not installed; the message names the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise MissingExtra(f"{module} is not installed: pip install '{DISTRIBUTION}[{extra}]'", name=module)
