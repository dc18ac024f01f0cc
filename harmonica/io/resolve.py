"""The resolution of a configured model path to a local path."""

import re
from pathlib import Path

from harmonica.builtin import CHAMPION, EMOJI_CHAMPION, EMOJI_DIT, FASHION_DIT, FASHION_PIXART
from harmonica.io.hub import from_hub
from harmonica.io.object_store import from_store
from harmonica.io.paths import is_remote, resolved

BUILTIN, BUILTIN_TEXT, BUILTIN_COLOUR = "builtin:fashion-dit", "builtin:fashion-pixart", "builtin:emoji-dit"
_BUILTINS = {BUILTIN: FASHION_DIT, BUILTIN_TEXT: FASHION_PIXART, BUILTIN_COLOUR: EMOJI_DIT}
_CHAMPIONS = {BUILTIN: CHAMPION, BUILTIN_COLOUR: EMOJI_CHAMPION}

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)


def shipped_router(model_path: str) -> Path | None:
    """Return the folder of a built-in model's router; None for other models."""
    return _CHAMPIONS.get(model_path)


def pinned(path: str, revision: str) -> str:
    """Return `path` with the revision added if it is a hub id without one."""
    found = _HUB_ID.fullmatch(path)
    if not revision or found is None or found[2] or Path(resolved(path, "model.path")).exists():
        return path
    return f"{path}@{revision}"


def local_path(path: str, revision: str = "", *, field: str = "model.path") -> Path:
    """Return the local path of `path`, fetched into a cache first if it is remote.

    Args:
        path: the name of a built-in model, such as `builtin:fashion-dit`, a file or folder (see
            `harmonica.io.paths`), an s3:// or gs:// URI, or a Hugging Face id, `org/name` or
            `org/name@revision`.
        revision: the revision of a Hugging Face id that names none.
        field: the name of `path` in errors.

    Raises:
        ValueError: it is not there or cannot be fetched; the message names the field and the cure.
    """
    if path in _BUILTINS:
        return _BUILTINS[path]
    place = resolved(path, field)
    if is_remote(place):
        return from_store(place, field)
    if Path(place).exists():
        return Path(place)
    hub_id = _HUB_ID.fullmatch(path)
    if hub_id is None:
        raise ValueError(
            f"{field} {path} does not exist: give {BUILTIN}, a model folder, a .pt file, an s3:// URI or a "
            "Hugging Face id"
        )
    return from_hub(hub_id[1], hub_id[2] or revision, field)
