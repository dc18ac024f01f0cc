"""Admit only requests that send one of the endpoint's bearer keys."""

import hashlib
import hmac
import os

from fastapi.security import HTTPBearer
from starlette.types import ASGIApp, Receive, Scope, Send

from harmonica.io.paths import local

from .http_errors import ApiError

ENVIRONMENT = "HARMONICA_API_KEYS"
OPEN_PATHS = frozenset({"/", "/health", "/healthz", "/livez", "/readyz", "/docs", "/openapi.json"})
"""Paths that need no key: the page, health and documentation."""
BEARER = HTTPBearer(scheme_name="key", auto_error=False)
"""Description of what `RequireKey` checks, for the OpenAPI document; it checks nothing itself.

As a dependency it would be asked after the body is read, and for known paths alone.
"""
_HOW = "send Authorization: Bearer KEY with one of the server's keys"


def load_keys(file: str) -> tuple[str, ...]:
    """Load the keys of a file, or without one those of HARMONICA_API_KEYS.

    Args:
        file: path of a file with a key a line; "" takes the variable, whose keys commas separate.

    Returns:
        The keys; none if there is neither a file nor a variable.

    Raises:
        ValueError: the file cannot be read, or the file or variable is there and holds no key, or a remark:
            an endpoint that was meant to be closed must not open.
    """
    if not file:
        given = os.environ.get(ENVIRONMENT, "")
        keys = tuple(filter(None, map(str.strip, given.split(","))))
        if given and not keys:
            raise ValueError(
                f"{ENVIRONMENT} is set and holds no key: give keys separated by commas, or unset it"
            )
        return _checked(keys, ENVIRONMENT)
    cure = f"give a file with a key a line, or leave it empty and set {ENVIRONMENT}"
    try:
        text = local(file, "serve.api_keys_file").read_text(encoding="utf-8-sig")
        keys = tuple(filter(None, map(str.strip, text.splitlines())))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"serve.api_keys_file is {file!r}, which cannot be read ({error}): {cure}"
        ) from error
    if not keys:
        raise ValueError(f"serve.api_keys_file is {file!r}, which holds no key: {cure}")
    return _checked(keys, f"serve.api_keys_file is {file!r}, which")


def _checked(keys: tuple[str, ...], source: str) -> tuple[str, ...]:
    """Refuse a remark, or a line that is switched off, in place of a key.

    It could be guessed.

    Raises:
        ValueError: there is one; the message says which, and not what it is.
    """
    for number, key in enumerate(keys, start=1):
        if key.startswith("#") or len(key.split()) > 1:
            raise ValueError(
                f"{source} has as number {number} of its keys one that begins with # or has a space inside: "
                "give keys alone, without remarks"
            )
    return keys


def key_headers(file: str) -> dict[bytes, bytes]:
    """Return the headers with which this program sends its own requests."""
    keys = load_keys(file)
    return {b"authorization": f"Bearer {keys[0]}".encode()} if keys else {}


class RequireKey:
    """ASGI middleware answers 401 to requests without one of the keys.

    It keeps only digests of the keys.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", "").rstrip("/"))
        is_open = scope["type"] == "lifespan" or (scope["type"] == "http" and path in OPEN_PATHS)
        message = None if is_open else self._refusal(scope)
        if message is None:
            await self._app(scope, receive, send)
            return
        error = ApiError(401, message, None, "invalid_api_key", {"www-authenticate": "Bearer"})
        await error.response()(scope, receive, send)

    def _refusal(self, scope: Scope) -> str | None:
        """Return why the request is refused, or None; nothing that was sent is repeated."""
        sent = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        if len(sent) != 1:
            return f"there is {'no' if not sent else 'more than one'} Authorization header: {_HOW}"
        scheme, _, key = sent[0].partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # Every key is compared, as a digest of fixed length: the time taken reveals nothing of a key.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer":
            return f"the Authorization header is of another scheme than Bearer: {_HOW}"
        return None if any(matches) else f"no such API key: {_HOW}"
