"""Bearer keys: who may ask the endpoint for images."""

import hashlib
import hmac
import os

from starlette.types import ASGIApp, Receive, Scope, Send

from harmonica.paths import local
from pipelines.serving.http_errors import ApiError

ENVIRONMENT = "HARMONICA_API_KEYS"
OPEN_PATHS = frozenset({"/", "/healthz", "/livez", "/readyz", "/docs", "/openapi.json"})
"""What says nothing that a key protects: the page, health and documentation."""


def load_keys(file: str) -> tuple[str, ...]:
    """Keys of a file, one a line, else those of HARMONICA_API_KEYS, separated by commas; may be none.

    Raises:
        ValueError: the file cannot be read or holds no key: an endpoint meant to be closed is not opened.
    """
    if not file:
        return tuple(filter(None, map(str.strip, os.environ.get(ENVIRONMENT, "").split(","))))
    cure = f"give a file with a key a line, or leave it empty and set {ENVIRONMENT}"
    try:
        keys = tuple(
            filter(None, map(str.strip, local(file, "serve.api_keys_file").read_text().splitlines()))
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"serve.api_keys_file is {file!r}, which cannot be read ({error}): {cure}"
        ) from error
    if not keys:
        raise ValueError(f"serve.api_keys_file is {file!r}, which holds no key: {cure}")
    return keys


class RequireKey:
    """ASGI middleware: 401 without one of the keys. Only their digests are kept."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN_PATHS)
        if is_open or self._knows(scope):
            await self._app(scope, receive, send)
            return
        message = "no such API key: send Authorization: Bearer KEY with one of the server's keys"
        error = ApiError(401, message, None, "invalid_api_key", {"www-authenticate": "Bearer"})
        await error.response()(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        header = dict(scope.get("headers", ())).get(b"authorization", b"")
        kind, _, key = header.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # All of them, by digests of one length: the time taken says neither which nor how much fits.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return kind.lower() == b"bearer" and any(matches)
