"""The warning about imports of a module by its name of the last release."""

import warnings


def warn_moved(old: str, new: str) -> None:
    """Warn that a module is imported by its old name.

    The old module itself calls this.
    """
    message = f"{old} is now {new}: use that name, the old one goes with the next release"
    warnings.warn(message, FutureWarning, stacklevel=3)
