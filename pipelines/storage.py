"""One storage path for everything a run leaves: a local folder, or s3://bucket/prefix."""

import contextlib
import errno
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pyarrow import fs

from harmonica.models.file_systems import open_uri, shown

_PROBE = ".write-probe"
ENDPOINT = "AWS_ENDPOINT_URL"
"""What pyarrow, boto3 (and so MLflow) and s3fs all read."""


def settle_endpoint(endpoint: str = "") -> None:
    """Say in this process's environment, once for all libraries, where S3 is.

    boto3 and s3fs also read the address of a store from a profile in `~/.aws/config`, which pyarrow does
    not: whatever boto3 would take, all take.

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
    """The folder of one run under the storage path, by pyarrow, so that local and S3 are one code."""

    def __init__(self, storage_path: str, run_id: str, *, patient: bool = False) -> None:
        """
        Args:
            patient: outlast an S3 store that does not answer for some 25 s.

        Raises:
            ValueError: `storage_path` is of no known kind.
        """
        self.is_local = "://" not in storage_path
        self.root = str(Path(storage_path).resolve()) if self.is_local else storage_path
        self.run_id = run_id
        self._fs, root = open_uri(self.root, "storage_path", patient=patient)
        self._run = f"{root}/{run_id}"

    def uri(self, name: str = "") -> str:
        """Where `name` of this run lies, for people and for Ray Train."""
        base, _, query = self.root.partition("?")
        path = "/".join(part for part in (base.rstrip("/"), self.run_id, name) if part)
        return f"{path}?{query}" if query else path

    def check_writable(self) -> None:
        """Fail before any work starts where the storage path cannot be written.

        Raises:
            ValueError: names the path and the reason.
        """
        try:
            self.write_bytes(_PROBE, b"")
            self.delete(_PROBE)
        except OSError as error:
            raise ValueError(
                f"storage_path {shown(self.root)} cannot be written ({error}): give a writable folder or "
                "bucket"
            ) from error

    def exists(self, name: str) -> bool:
        return self._fs.get_file_info(f"{self._run}/{name}").type != fs.FileType.NotFound

    def names(self, folder: str) -> list[str]:
        """Files that lie in a folder of the run, sorted; without those still being written."""
        found = self._fs.get_file_info(fs.FileSelector(f"{self._run}/{folder}", allow_not_found=True))
        return sorted(one.base_name for one in found if one.is_file and not one.base_name.endswith(".tmp"))

    def read_bytes(self, name: str) -> bytes:
        with self._fs.open_input_stream(f"{self._run}/{name}") as stream:
            return stream.read()

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write so that a reader sees the old content or the new, never a part.

        Raises:
            OSError: names what could not be written; what was there before is as it was.
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
        return json.loads(self.read_bytes(name))

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=1) + "\n").encode())

    def upload_folder(self, folder: Path, name: str) -> None:
        """Copy every file of a local folder, `config.json` last: a reader takes it as the manifest."""
        files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.name == "config.json")
        for path in files:
            self.write_bytes(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    @contextlib.contextmanager
    def local_folder(self, name: str) -> Iterator[Path]:
        """A folder of the run to read: a copy that is gone afterwards (local storage: the folder itself)."""
        if self.is_local:
            yield Path(self._run) / name
            return
        with tempfile.TemporaryDirectory(prefix="harmonica-") as target:
            fs.copy_files(f"{self._run}/{name}", target, source_filesystem=self._fs)
            yield Path(target)


def _write_local(path: Path, data: bytes) -> None:
    """On disk, flushed, before it takes its name: a full disk or a power cut leaves the old content."""
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
