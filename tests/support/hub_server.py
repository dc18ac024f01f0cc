"""The few endpoints of the Hugging Face hub that a snapshot is fetched through, on loopback."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "HubServer"

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        path = self.path.split("?")[0]
        repo, revisions = self.server.repo, (COMMIT, "main")
        if path.startswith(f"/api/models/{repo}/revision/") and path.endswith(revisions):
            self._reply(json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"/api/models/{repo}/tree/") and path.endswith(revisions):
            self._reply(json.dumps([self._entry(file) for file in self._files()]).encode())
        elif path.startswith(f"/{repo}/resolve/{COMMIT}/"):
            file = self.server.folder / path.removeprefix(f"/{repo}/resolve/{COMMIT}/")
            self._reply(file.read_bytes() if file.is_file() else None, "EntryNotFound")
        else:
            self._reply(None, "RevisionNotFound" if repo in path else "RepoNotFound")

    do_HEAD = do_GET

    def _files(self) -> list[Path]:
        return sorted(path for path in self.server.folder.rglob("*") if path.is_file())

    def _entry(self, file: Path) -> dict[str, object]:
        data = file.read_bytes()
        name = file.relative_to(self.server.folder).as_posix()
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _reply(self, body: bytes | None, error: str = "") -> None:
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.send_header("X-Repo-Commit", COMMIT)
        if body is None:
            self.send_header("X-Error-Code", error)
        else:
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


class HubServer(ThreadingHTTPServer):
    """One repository, served from a folder."""

    def __init__(self, repo: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Hub)
        self.repo, self.folder = repo, folder
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serve_hub(repo: str, folder: Path) -> Iterator[HubServer]:
    with HubServer(repo, folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
