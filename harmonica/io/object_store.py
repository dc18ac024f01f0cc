"""Models of an object store, which are copied once to a local folder.

The folder is `$HARMONICA_CACHE`, by default `~/.cache/harmonica`. A copy is keyed by the URI and by names,
sizes and times of the objects, so a changed object is fetched anew; copies are never deleted, since a
running model may be mapped from one.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from harmonica.io.paths import scrubbed, shown
from harmonica.io.repository_files import wanted

logger = logging.getLogger(__name__)


def from_store(uri: str, field: str) -> Path:
    """Return the local copy of a file or model folder, fetched if need be.

    Args:
        uri: the URI that `harmonica.io.paths.resolved` returned.
        field: the name of `uri` in errors.

    Raises:
        ValueError: it is not there, holds no model, or cannot be fetched; never shows credentials.
    """
    from pyarrow import ArrowException

    try:
        found = _fetch(uri, field)
    except (ArrowException, OSError) as error:
        said = scrubbed(f"{type(error).__name__}: {error}", uri)
        raise ValueError(
            f"{field} {shown(uri)} cannot be fetched ({said}): check the URI and the credentials"
        ) from None  # pyarrow quotes the URI with all its secrets
    if found is None:
        raise ValueError(f"{field} {shown(uri)} holds no model: give a model folder or a checkpoint file")
    return found


def cache_folder() -> Path:
    """Return the folder in which copies are kept."""
    if chosen := os.environ.get("HARMONICA_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "harmonica"


def _fetch(uri: str, field: str) -> Path | None:
    from filelock import FileLock
    from pyarrow import fs

    from harmonica.io.file_systems import open_uri

    store, root = open_uri(uri, field)
    info = store.get_file_info(root)
    is_file = info.type == fs.FileType.File
    files = {info.base_name: info} if is_file else _folder_files(store, root, f"{field} {shown(uri)}")
    if not files:
        return None
    key = json.dumps([shown(uri), [(name, found.size, found.mtime_ns) for name, found in files.items()]])
    label = re.sub(r"[^\w.-]", "_", PurePosixPath(root).stem)
    target = cache_folder() / f"{label}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # the first replica of a node copies, the others wait for it
        if not target.exists():
            logger.info("fetching %s into %s, %d files", shown(uri), target, len(files))
            _copy(store, files, target)
    return target / info.base_name if is_file else target


def _folder_files(store: Any, root: str, source: str) -> dict[str, Any]:
    """Return the files that loading may need, by their paths in the folder."""
    from pyarrow import fs

    def read(name: str) -> bytes:
        with store.open_input_stream(f"{root}/{name}") as stream:
            content: bytes = stream.read()
            return content

    found = store.get_file_info(fs.FileSelector(root, recursive=True))
    files = {file.path[len(root) + 1 :]: file for file in found if file.type == fs.FileType.File}
    return {name: files[name] for name in wanted(files, read, source)}


def _copy(store: Any, files: dict[str, Any], target: Path) -> None:
    """Copy all files or none: a reader sees the folder once it is complete."""
    from harmonica.io.file_systems import copy_file

    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
    try:
        for name, info in files.items():
            copy = partial / name
            copy_file(store, info.path, copy)
            if copy.stat().st_size != info.size:
                raise OSError(f"{name} changed while it was read, fetch it again")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
