"""Repeat a request if its replica is lost, by middleware of Serve's HTTP proxy.

Serve answers such a request with 500, or not at all. Generating has no side effects, so repeating is safe
until a part of an answer has been sent. The proxy's own errors are answered in the shape of OpenAI's, and an
invalid X-Request-Id is replaced, since Serve would echo it.

Serve also repeats by itself: a replica that is lost before its acceptance has arrived is replaced by another.
The body however is handed out once, to whichever replica calls the proxy for it first, and is lost with that
one (`HTTPProxy.receive_asgi_messages`). Small bodies therefore travel in the request's scope as well.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware

from .request_ids import HEADER, with_request_id

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Environment variable in which Serve's proxies look for the name of `middlewares`."""
BODY_EXTENSION = "harmonica.body"
"""The extension of a scope that holds the whole body, in bytes, of a request that came through here."""
_ATTEMPTS = 4
_PAUSE_S = 0.25
_BODY_S = 1.0
"""How long a body is waited for before its request is passed on; what is slower is passed on as it comes."""
_MAX_BODY_BYTES = 256 * 1024
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def _is_text(start: Message) -> bool:
    kind: bytes = dict(start.get("headers", ())).get(b"content-type", b"")
    return kind.startswith(b"text/plain")


def _is_proxy_s_own(start: Message) -> bool:
    """Return whether the proxy answers, not the application, which answers in JSON."""
    return start["status"] in (500, 503) and _is_text(start)


def _finds_no_application(body: Message) -> bool:
    """Return whether a 404 is the proxy's own, which has no application to ask.

    The application is being deleted then, and what a replica of it had taken is asked for again in vain.
    """
    text: bytes = body.get("body", b"")
    return text.startswith(b"Path '") and b"/-/routes" in text


def _is_small(headers: list[tuple[bytes, bytes]]) -> bool:
    """Return whether the headers declare a body that can be kept, or none at all."""
    named = dict(headers)
    size = named.get(b"content-length", b"0")
    return b"transfer-encoding" not in named and size.isdigit() and int(size) <= _MAX_BODY_BYTES


class _Repeatable:
    """Give each attempt the client's request from its start, then as it arrives.

    A body above 256 KiB is not kept, so it can be sent only once.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive, self._kept, self._size = receive, list[Message](), 0
        self.has_gone = False

    @property
    def is_kept(self) -> bool:
        """Return whether the request can be sent again."""
        return self._size <= _MAX_BODY_BYTES

    async def whole(self, timeout_s: float) -> bytes | None:
        """Return the body, or None if it has not come in time.

        Attempts get what has come by then. It is called before them, for a body that is small.
        """
        receive, body = self.again(), bytearray()
        try:
            async with asyncio.timeout(timeout_s):
                while (message := await receive())["type"] == "http.request":
                    body += message.get("body", b"")
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            pass
        return None

    def again(self) -> Receive:
        """Return the `receive` of one more attempt."""
        position = 0

        async def receive() -> Message:
            nonlocal position
            if position < len(self._kept):
                position += 1
                return self._kept[position - 1]
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.has_gone = True
                return message
            self._size += len(message.get("body", b""))
            if self.is_kept:
                self._kept.append(message)
                position += 1
            return message

        return receive


class RetryLost:
    """ASGI middleware asks up to four replicas, then answers 503."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        headers, request_id = with_request_id(scope["headers"])
        scope, request = {**scope, "headers": headers}, _Repeatable(receive)
        if _is_small(headers) and (body := await request.whole(_BODY_S)) is not None:
            scope["extensions"] = {**(scope.get("extensions") or {}), BODY_EXTENSION: body}
        if request.has_gone:
            return
        for left in reversed(range(_ATTEMPTS)):
            refused = await self._ask(scope, request, send)
            if refused is None:
                return
            if refused in (404, 503) or not left or not request.is_kept:
                break
            await asyncio.sleep(_PAUSE_S)
        message = "no replica can answer now: try again in 1 s"
        error = {"message": message, "type": "server_error", "param": None, "code": "unavailable"}
        body = json.dumps({"error": error}).encode()
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"1"), (HEADER, request_id)]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _ask(self, scope: Message, request: _Repeatable, send: Send) -> int | None:
        """Return the status the proxy refused with, or None.

        None means that an answer was sent, or that the client is gone.
        """
        refused: int | None = 500  # if a replica is lost, the proxy may answer nothing at all
        held: Message | None = None  # the start of a 404 whose words decide whose it is

        async def pass_on(message: Message) -> None:
            nonlocal refused, held
            if message["type"] == "http.response.start":
                refused = message["status"] if _is_proxy_s_own(message) else None
                if message["status"] == 404 and _is_text(message):
                    refused, held = 404, message
                    return
            if held is not None and not _finds_no_application(message):
                refused, start = None, held
                await send(start)
            held = None
            if refused is None:
                await send(message)

        # A copy: the proxy changes paths in it.
        await self._app({**scope, "headers": list(scope["headers"])}, request.again(), pass_on)
        return None if request.has_gone else refused


def middlewares() -> list[Middleware]:
    """Return the middleware for Serve's proxies, which find this by `CALLBACK`."""
    return [Middleware(RetryLost)]
