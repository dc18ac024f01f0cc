"""In Serve's HTTP proxy: a request whose ingress replica is lost goes to another one.

Serve answers such a request with 500, or not at all. Drawing has no side effects, so asking again is safe as
long as nothing of an answer has gone out. What the proxy itself refuses is put into OpenAI's shape.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Environment variable of the proxies that names `middlewares`."""
_ATTEMPTS = 4
_PAUSE_S = 0.25
_MAX_BODY_BYTES = 256 * 1024
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def _is_proxy_s_own(start: Message) -> bool:
    """Whether the proxy says it, not the application, which answers in JSON."""
    kind = dict(start.get("headers", ())).get(b"content-type", b"")
    return start["status"] in (500, 503) and kind.startswith(b"text/plain")


class RetryLost:
    """ASGI middleware."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        messages, is_whole = await _read(receive)
        for left in reversed(range(_ATTEMPTS if is_whole else 1)):
            refused = await self._ask(scope, list(messages), receive, send)
            if refused is None:
                return
            if refused == 503 or not left:
                break
            await asyncio.sleep(_PAUSE_S)
        message = "no replica can answer now: try again in 1 s"
        error = {"message": message, "type": "server_error", "param": None, "code": "unavailable"}
        body = json.dumps({"error": error}).encode()
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _ask(self, scope: Message, messages: list[Message], receive: Receive, send: Send) -> int | None:
        """The status that the proxy refused with; None where an answer has been sent, or nobody waits."""
        refused: int | None = 500  # of a lost replica the proxy may say nothing at all

        async def replay() -> Message:
            nonlocal refused
            message = messages.pop(0) if messages else await receive()
            if message["type"] == "http.disconnect":
                refused = None
            return message

        async def pass_on(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start":
                refused = message["status"] if _is_proxy_s_own(message) else None
            if refused is None:
                await send(message)

        # A copy: the proxy changes paths in it.
        await self._app({**scope, "headers": list(scope["headers"])}, replay, pass_on)
        return refused


async def _read(receive: Receive) -> tuple[list[Message], bool]:
    """What the client sends, and whether that is all of it: a large body is not kept."""
    messages, size = [], 0
    while size <= _MAX_BODY_BYTES:
        messages.append(message := await receive())
        size += len(message.get("body", b""))
        if not message.get("more_body", False):
            return messages, True
    return messages, False


def middlewares() -> list[Middleware]:
    """What Serve's proxies put in front of themselves."""
    return [Middleware(RetryLost)]
