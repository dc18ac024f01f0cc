"""`harmonica.core.sampling` under the name it had before 0.2."""

from harmonica.core.sampling import *  # noqa: F403
from harmonica.validation.moved import warn_moved

warn_moved("harmonica.sampling", "harmonica.core.sampling")
