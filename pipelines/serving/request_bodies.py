"""Read request bodies: complete, small, in time, and strictly JSON."""

import asyncio
import codecs
import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .http_errors import ApiError
from .proxy import BODY_EXTENSION

_CLOSE = {"connection": "close"}
"""Headers of an answer after which the rest of the body is not read."""


class ReadBody:
    """ASGI middleware reads the body before it calls the application.

    It answers 413 if the body is too large, and 408 if it is not complete in time. A body that the proxy's
    middleware has sent along (`pipelines.serving.proxy`) is there at once.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, timeout_s: float, larger: Mapping[str, int] | None = None
    ) -> None:
        """Bound the bodies of an application.

        Args:
            max_bytes: the largest body.
            timeout_s: how long a body may take.
            larger: the largest body by the end of the path, where it is another.
        """
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s
        self._larger = larger or {}

    def _limit(self, path: str) -> int:
        return next((most for end, most in self._larger.items() if path.endswith(end)), self._max_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(_sent_along(scope) or receive, self._limit(scope["path"]))
        except TimeoutError:
            text = f"the body was not whole after {self._timeout_s:g} s: send the request again"
            error = ApiError(408, text, None, "request_timeout", _CLOSE)
            await error.response()(scope, receive, send)
            return
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:
            return  # the client has gone
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if pending:
                return pending.pop()
            while (message := await receive())["type"] == "http.request":
                pass  # the body again, which was sent along
            return message

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive, max_bytes: int) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > max_bytes:
                text = f"the body has more than {max_bytes} bytes: send less"
                raise ApiError(413, text, None, "request_too_large", _CLOSE)
            if not message.get("more_body", False):
                return bytes(body)


def _sent_along(scope: Scope) -> Receive | None:
    """Return a `receive` for the body that the scope holds, or None."""
    body = (scope.get("extensions") or {}).get(BODY_EXTENSION)
    if body is None:
        return None

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


class _StrictRequest(Request):
    async def json(self) -> Any:
        """Parse JSON without NaN, Infinity, lone surrogates or endless nesting.

        Raises:
            json.JSONDecodeError: the body is not JSON; FastAPI makes a validation error of this.
        """
        body = (await self.body()).removeprefix(codecs.BOM_UTF8)
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


class StrictJsonRoute(APIRoute):
    """Read the body of a route's request as strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, called with a request that parses strictly."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly
