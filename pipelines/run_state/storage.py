"""A run is stored in a local folder, s3://bucket/prefix or gs://bucket/prefix."""

import contextlib
import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pyarrow import fs

from harmonica.io.file_systems import copy_file, list_folder, open_uri
from harmonica.io.paths import is_remote, resolved, shown

_PROBE = ".write-probe"
ENDPOINT = "AWS_ENDPOINT_URL"
"""Environment variable with the address of S3 that pyarrow and boto3, and so MLflow, read."""


def settle_endpoint(endpoint: str = "") -> None:
    """Set the address of S3 in this process's environment, once for all libraries.

    boto3 also reads the address of a store from a profile in `~/.aws/config`, which pyarrow does not; after
    this call both use the address that boto3 finds.

    Args:
        endpoint: overrides what environment and files say.
    """
    if endpoint:
        os.environ[ENDPOINT] = endpoint
        return
    import boto3

    found = boto3.Session().client("s3").meta.endpoint_url  # not the default session, which remembers
    if not (urlsplit(found).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        os.environ[ENDPOINT] = found


class RunStorage:
    """The folder of one run, which pyarrow's file systems read and write.

    It lies under the storage path.
    """

    def __init__(self, storage_path: str, run_id: str, *, patient: bool = False) -> None:
        """Connect to the storage; the folder need not exist.

        Args:
            patient: wait for an S3 store that does not answer, for some 25 s.

        Raises:
            ValueError: `storage_path` is of no known kind.
        """
        self.root = resolved(storage_path, "storage_path")
        self.is_local = not is_remote(self.root)
        self.run_id = run_id
        self._fs, root = open_uri(self.root, "storage_path", patient=patient)
        self._run = f"{root}/{run_id}"

    def uri(self, name: str = "") -> str:
        """Return the local path or the URI of `name` in this run."""
        if self.is_local:
            return str(Path(self.root, self.run_id, name))
        base, _, query = self.root.partition("?")
        path = "/".join(part for part in (base.rstrip("/"), self.run_id, name) if part)
        return f"{path}?{query}" if query else path

    def path(self, name: str) -> str:
        """Return the path of `name` in the run's file system.

        In a store it is the bucket, then the key.
        """
        return f"{self._run}/{name}"

    @property
    def shown_root(self) -> str:
        """Return the storage path as messages show it, without secrets."""
        return shown(self.root)

    def modified(self, name: str) -> float:
        """Return the time at which a file was written, in seconds since 1970.

        Raises:
            FileNotFoundError: the file is not there.
        """
        info = self._fs.get_file_info(f"{self._run}/{name}")
        if info.type == fs.FileType.NotFound:
            raise FileNotFoundError(self.uri(name))
        seconds: float = info.mtime.timestamp()
        return seconds

    def check_writable(self) -> None:
        """Check that the storage path can be written, before any work starts.

        Nothing is left there.

        Raises:
            ValueError: it cannot be written; the message names the path and the reason.
        """
        folders = [Path(self._run), *Path(self._run).parents] if self.is_local else []
        missing = [folder for folder in folders if not folder.exists()]
        try:
            self.write_bytes(_PROBE, b"")
            self.delete(_PROBE)
        except OSError as error:
            raise ValueError(
                f"storage_path {shown(self.root)} cannot be written ({error}): give a writable folder or "
                "bucket"
            ) from error
        finally:
            for folder in missing:  # the innermost first
                with contextlib.suppress(OSError):  # another run has begun in it
                    folder.rmdir()

    def exists(self, name: str) -> bool:
        """Return whether the run has this file."""
        return bool(self._fs.get_file_info(f"{self._run}/{name}").type != fs.FileType.NotFound)

    def names(self, folder: str, *, below: bool = False) -> list[str]:
        """Return the sorted names of the files in a folder of the run.

        With `below` there are those in its folders too. Files that are still being written are left out.
        """
        found = list_folder(self._fs, f"{self._run}/{folder}", recursive=below)
        return sorted(one.base_name for one in found if one.is_file and not one.base_name.endswith(".tmp"))

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file."""
        with self._fs.open_input_stream(f"{self._run}/{name}") as stream:
            content: bytes = stream.read()
            return content

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file so that a reader sees the old content or the new, never a part.

        Raises:
            OSError: the file could not be written; its old content is unchanged.
        """
        path = f"{self._run}/{name}"
        if self.is_local:
            _write_local(Path(path), data)
            return
        # An object store shows an object once it is complete, and needs no folders; only some have them.
        with self._fs.open_output_stream(path) as stream:
            stream.write(data)

    def delete(self, name: str) -> None:
        """Delete a file; one that is gone already is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(f"{self._run}/{name}")

    def delete_all(self, name: str) -> None:
        """Delete a file, or a folder and all in it; one that is gone already is no error."""
        path = f"{self._run}/{name}"
        kind = self._fs.get_file_info(path).type
        if kind == fs.FileType.Directory:
            self._fs.delete_dir(path)
        elif kind == fs.FileType.File:
            self.delete(name)

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file."""
        return json.loads(self.read_bytes(name))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all."""
        self.write_bytes(name, (json.dumps(value, indent=1) + "\n").encode())

    def upload_folder(self, folder: Path, name: str) -> None:
        """Copy every file of a local folder, `config.json` last.

        A reader takes that file as the manifest.
        """
        files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.name == "config.json")
        for path in files:
            self.write_bytes(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def replace_folder(self, folder: Path, name: str) -> None:
        """Replace a folder of the run by a local one; an empty local folder deletes it.

        On a disk the new folder takes the place of the old one whole. In an object store, which knows no
        folders, the manifest is written last.
        """
        if self.is_local:
            self._swap_folder(folder, name)
            return
        new = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        found = list_folder(self._fs, f"{self._run}/{name}", recursive=True)
        start = len(f"{self._run}/{name}/")
        for stale in {one.path[start:] for one in found if one.is_file} - new:
            self.delete(f"{name}/{stale}")
        self.upload_folder(folder, name)

    def _swap_folder(self, folder: Path, name: str) -> None:
        target = Path(self._run) / name
        for left in target.parent.glob(f".{name}.*"):  # of one that was killed
            shutil.rmtree(left)
        old, new = (f".{name}.{secrets.token_hex(4)}.{kind}" for kind in ("old", "new"))
        self.upload_folder(folder, new)
        if target.exists():
            target.rename(target.with_name(old))
        if (Path(self._run) / new).exists():
            (Path(self._run) / new).rename(target)
        shutil.rmtree(target.with_name(old), ignore_errors=True)

    @contextlib.contextmanager
    def local_folder(self, name: str) -> Iterator[Path]:
        """Yield a local path at which a folder of the run can be read.

        It is a temporary copy, or in local storage the folder itself.

        Raises:
            ValueError: a file of a store would be copied to another place.
        """
        if self.is_local:
            yield Path(self._run) / name
            return
        with tempfile.TemporaryDirectory(prefix="harmonica-") as target:
            self._copy_folder(name, Path(target))
            yield Path(target)

    def _copy_folder(self, name: str, target: Path) -> None:
        """Copy a folder of a store.

        pyarrow's own function writes wherever keys with `..` lead.
        """
        root = f"{self._run}/{name}/"
        for info in self._fs.get_file_info(fs.FileSelector(root.rstrip("/"), recursive=True)):
            if not info.is_file:
                continue
            copy = target / info.path.removeprefix(root)
            if ".." in copy.parts or not copy.is_relative_to(target):
                raise ValueError(
                    f"{shown(self.uri(name))} holds {info.path}, which leads out of it: delete that object"
                )
            copy_file(self._fs, info.path, copy)


def _write_local(path: Path, data: bytes) -> None:
    """Write to a flushed temporary file and rename it.

    A failure leaves the old content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with part.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"{path} of {len(data):,} bytes finds no room ({error.strerror}); what was written before it "
                "is whole: make room and run again with the same run id",
            ) from error
        raise
