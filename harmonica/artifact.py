"""`harmonica.core.artifact` under the name it had before 0.2."""

from harmonica.core.artifact import *  # noqa: F403
from harmonica.validation.moved import warn_moved

warn_moved("harmonica.artifact", "harmonica.core.artifact")
