"""ASGI middleware that settles which resource a request means, before anything else looks at its path."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class SettlePath:
    """A slash at the end changes nothing, and HEAD is answered as GET is, without the body.

    Starlette would redirect to a URL that it makes of the Host header, which anybody can choose.
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
