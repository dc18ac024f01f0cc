"""Normalize a request's path and method before anything else reads them."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class NormalizePath:
    """ASGI middleware removes a final slash, and answers HEAD as GET without a body.

    Starlette would redirect to a URL made from the Host header, which the client can choose freely.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, root = scope["path"].rstrip("/"), scope.get("root_path", "").rstrip("/")
        scope = {**scope, "path": f"{root}/" if path == root else path}
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, without_body)
