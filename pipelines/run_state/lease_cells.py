"""Compare-and-swap of one small file of a run, on a disk or in a store.

There is one class for disks, one for S3, and one for stores that lack conditional writes.

`swap` and `delete` take the content that the caller expects: if it is another, another writer was first.
Contents never repeat, since each writer adds something random.
"""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

from .storage import RunStorage

NAME = "lease.json"
_SETTLE_S = 2.0
_FAILED = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412", "409", "404")
_UNKNOWN = ("NotImplemented", "501")


class Cell(Protocol):
    """A small file whose content is replaced by compare-and-swap."""

    def read(self) -> tuple[bytes, float]:
        """Return the content and its age in seconds; b"" if there is none.

        The age is by the storage's clock.
        """

    def swap(self, before: bytes, after: bytes) -> bool:
        """Replace the content if it equals `before`; return whether it did.

        `before` is b"" where the file should not exist yet.
        """

    def delete(self, before: bytes) -> None:
        """Delete the file if its content equals `before`."""


def cell_of(storage: RunStorage) -> Cell:
    """Return the cell of a run's lease."""
    if storage.is_local:
        return DiskCell(Path(storage.uri(NAME)))
    return S3Cell(storage) if storage.root.startswith("s3:") else PlainCell(storage)


class DiskCell:
    """A file on a disk, which is locked on all machines that mount it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[bytes, float]:
        """Return the content and its age in seconds by the file server's clock."""
        try:
            with self._locked(os.O_RDONLY) as handle:
                content, changed = _content(handle), os.fstat(handle).st_mtime
            if not content:
                return b"", 0.0
            with tempfile.TemporaryFile(dir=self.path.parent) as now:  # by the clock of a file server
                now.write(b"0")
                now.flush()
                return content, os.fstat(now.fileno()).st_mtime - changed
        except FileNotFoundError:
            return b"", 0.0

    def swap(self, before: bytes, after: bytes) -> bool:
        """Replace the content under the lock, if it equals `before`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(os.O_RDWR | os.O_CREAT) as handle:
            if _content(handle) != before:
                return False
            os.ftruncate(handle, 0)
            os.pwrite(handle, after, 0)
            os.fsync(handle)
        return True

    def delete(self, before: bytes) -> None:
        """Delete the file under the lock, if its content equals `before`."""
        with contextlib.suppress(FileNotFoundError), self._locked(os.O_RDWR) as handle:
            if _content(handle) == before:
                self.path.unlink()

    @contextlib.contextmanager
    def _locked(self, flags: int) -> Iterator[int]:
        while True:
            handle = os.open(self.path, flags, 0o666)
            try:
                with contextlib.suppress(OSError):  # a file system without locks has nothing better
                    fcntl.flock(handle, fcntl.LOCK_SH if flags == os.O_RDONLY else fcntl.LOCK_EX)
                if os.fstat(handle).st_nlink:  # else it was deleted while this one waited for the lock
                    yield handle
                    return
            finally:
                os.close(handle)


def _content(handle: int) -> bytes:
    return os.pread(handle, 1 << 20, 0)


class PlainCell:
    """An object of a store without conditional writes.

    It is written, then read again after a while.
    """

    def __init__(self, storage: RunStorage) -> None:
        self._storage = storage

    def read(self) -> tuple[bytes, float]:
        """Return the content and its age in seconds by this machine's clock."""
        try:
            return self._storage.read_bytes(NAME), time.time() - self._storage.modified(NAME)
        except FileNotFoundError:
            return b"", 0.0

    def swap(self, before: bytes, after: bytes) -> bool:
        """Write the content if it equals `before`; return whether it was not overwritten."""
        if self.read()[0] != before:
            return False
        self._storage.write_bytes(NAME, after)
        time.sleep(_SETTLE_S)  # whoever looked before this write has written by then
        return self.read()[0] == after

    def delete(self, before: bytes) -> None:
        """Delete the object if its content equals `before`; this is not atomic."""
        if self.read()[0] == before:
            self._storage.delete(NAME)


class S3Cell:
    """An object of an S3 store, which is replaced by conditional writes."""

    def __init__(self, storage: RunStorage) -> None:
        import boto3
        from botocore.config import Config

        query = dict(parse_qsl(storage.root.partition("?")[2]))
        endpoint = query.get("endpoint_override", "")
        if endpoint and "://" not in endpoint:
            endpoint = f"{query.get('scheme', 'https')}://{endpoint}"
        self._client: Any = boto3.Session().client(  # not the default session, which remembers
            "s3",
            endpoint_url=endpoint or None,
            region_name=query.get("region"),
            config=Config(
                connect_timeout=5,
                read_timeout=10,
                retries={"max_attempts": 3},
                request_checksum_calculation="when_required",  # which not all stores know
            ),
        )
        bucket, _, key = storage.path(NAME).partition("/")
        self._place = {"Bucket": bucket, "Key": key}
        self._plain = PlainCell(storage)
        self._known = (b"", "")
        """The last content read, and its ETag."""

    def read(self) -> tuple[bytes, float]:
        """Return the content and its age in seconds by the store's clock."""
        from botocore.exceptions import ClientError

        try:
            found = self._client.get_object(**self._place)
        except ClientError as error:
            if error.response["Error"]["Code"] in _FAILED:
                return b"", 0.0
            raise
        content = found["Body"].read()
        self._known = (content, found["ETag"])
        now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
        return content, (now - found["LastModified"]).total_seconds()

    def swap(self, before: bytes, after: bytes) -> bool:
        """Replace the object by a conditional write, if it equals `before`."""
        from botocore.exceptions import ClientError

        if before and self._known[0] != before and self.read()[0] != before:
            return False
        condition = {"IfMatch": self._known[1]} if before else {"IfNoneMatch": "*"}
        try:
            put = self._client.put_object(**self._place, Body=after, **condition)
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code in _UNKNOWN:
                return self._plain.swap(before, after)
            if code in _FAILED:
                return False
            raise
        self._known = (after, put["ETag"])
        return True

    def delete(self, before: bytes) -> None:
        """Delete the object if its content equals `before`."""
        if self.read()[0] == before:
            self._client.delete_object(**self._place)
