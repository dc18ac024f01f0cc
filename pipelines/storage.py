"""One storage path for everything a run leaves: a local folder, or s3://bucket/prefix."""

import json
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

from pyarrow import fs

_PROBE = ".write-probe"


class RunStorage:
    """The folder of one run under the storage path, by pyarrow, so that local and S3 are one code."""

    def __init__(self, storage_path: str, run_id: str) -> None:
        self.is_local = "://" not in storage_path
        self.root = str(Path(storage_path).resolve()) if self.is_local else storage_path
        self.run_id = run_id
        try:
            self._fs, self._root = fs.FileSystem.from_uri(self.root)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"storage_path {storage_path} is not usable ({error}): give a folder or s3:// URI"
            ) from error
        self._run = f"{self._root.rstrip('/')}/{run_id}"

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
            self._fs.delete_file(f"{self._run}/{_PROBE}")
        except OSError as error:
            raise ValueError(
                f"storage_path {self.root} cannot be written ({error}): give a writable folder or bucket"
            ) from error

    def exists(self, name: str) -> bool:
        return self._fs.get_file_info(f"{self._run}/{name}").type != fs.FileType.NotFound

    def read_bytes(self, name: str) -> bytes:
        with self._fs.open_input_stream(f"{self._run}/{name}") as stream:
            return stream.read()

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write so that a reader sees the old content or the new, never a part."""
        path = f"{self._run}/{name}"
        self._fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
        # An object store shows an object once it is complete; a file system needs the rename.
        target = f"{path}.{secrets.token_hex(4)}.tmp" if self.is_local else path
        with self._fs.open_output_stream(target) as stream:
            stream.write(data)
        if self.is_local:
            os.replace(target, path)

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=1) + "\n").encode())

    def upload_folder(self, folder: Path, name: str) -> None:
        """Copy every file of a local folder, `config.json` last: a reader takes it as the manifest."""
        files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.name == "config.json")
        for path in files:
            self.write_bytes(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def download_folder(self, name: str) -> Path:
        """A local copy of a folder of the run, in a temporary place (local storage: the folder itself)."""
        if self.is_local:
            return Path(self._run) / name
        target = Path(tempfile.mkdtemp(prefix="harmonica-"))
        fs.copy_files(f"{self._run}/{name}", str(target), source_filesystem=self._fs)
        return target
