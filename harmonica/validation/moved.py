"""The warning of a module that is still found under the name it had in the release before."""

import warnings


def warn_moved(old: str, new: str) -> None:
    """Warn whoever imports a module by its old name; to be called by that module itself."""
    message = f"{old} is now {new}: use that name, the old one goes with the next release"
    warnings.warn(message, FutureWarning, stacklevel=3)
