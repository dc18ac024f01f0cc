"""The opening of paths and URIs for all code that reads or writes files.

S3 is set up as Amazon's own tools are, by environment and `~/.aws`, so that pyarrow, boto3 and MLflow agree;
`pipelines.run_state.storage.settle_endpoint` sets the address that pyarrow does not read from `~/.aws`.
"""

import shutil
from pathlib import Path

from pyarrow import fs

from harmonica.io.paths import is_remote, resolved, scrubbed, shown

# Waits of 50 ms, doubled each time: 10 tries outlast a store that is gone for some 25 s; by itself 6 s.
_PATIENT_TRIES = 10
_CHUNK = 16 * 2**20  # each read is a request to the store


def open_uri(uri: str, field: str, *, patient: bool = False) -> tuple[fs.FileSystem, str]:
    """Return the file system of a path or URI, and the path in it.

    The path ends in no slash.

    Args:
        field: the name of `uri` in errors.
        patient: whether to go on trying where an S3 store does not answer, some 50 s in all.

    Raises:
        ValueError: the URI cannot be used; never shows credentials.
    """
    path = resolved(uri, field)
    if not is_remote(path):
        return fs.LocalFileSystem(), path.rstrip("/")
    try:
        filesystem, root = fs.FileSystem.from_uri(path)  # noqa: TID251
        if patient and isinstance(filesystem, fs.S3FileSystem):
            filesystem = _patient(filesystem)
    except (ValueError, OSError) as error:
        said = scrubbed(f"{type(error).__name__}: {error}", path)
        raise ValueError(
            f"{field} {shown(path)} cannot be opened ({said}): give a path, or an s3:// or gs:// URI"
        ) from None  # pyarrow quotes the URI with all its secrets
    return filesystem, root.rstrip("/")


def list_folder(filesystem: fs.FileSystem, path: str, *, recursive: bool = False) -> list[fs.FileInfo]:
    """Return what is in a folder; nothing where there is no such folder.

    Args:
        recursive: whether to list what is in its folders too.
    """
    try:
        found: list[fs.FileInfo] = filesystem.get_file_info(fs.FileSelector(path, True, recursive))
    except FileNotFoundError:
        # A local folder that was not there, and is made before pyarrow looks a second time.
        return []
    return found


def copy_file(filesystem: fs.FileSystem, path: str, target: Path) -> None:
    """Copy a file of a store to a local path, whose folder is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with filesystem.open_input_stream(path) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, _CHUNK)


def _patient(filesystem: fs.S3FileSystem) -> fs.S3FileSystem:
    """Return the file system with more retries.

    A URI cannot set their number, so the file system is made again as unpickling does.
    """
    _, (settings,) = filesystem.__reduce__()
    return fs.S3FileSystem(**settings, retry_strategy=fs.AwsDefaultS3RetryStrategy(_PATIENT_TRIES))
