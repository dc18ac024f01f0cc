"""What the endpoint refuses, in the shape of OpenAI's errors: `{"error": {message, type, param, code}}`."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from harmonica.text_encoder import PromptTooLong

_MAX_ECHO = 100


class Overloaded(Exception):
    """The source takes no more rows now."""


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status, headers)


def _explain(error: Any) -> ApiError:
    """A validation error as field, value and cure."""
    kind, location = error["type"], error["loc"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {error['ctx']['error']}", None, "invalid_json")
    if len(location) < 2 or location[0] != "body":
        message = "the body is not a JSON object: send one, with Content-Type: application/json"
        return ApiError(400, message, None, "invalid_json")
    name = str(location[1])
    if kind == "extra_forbidden":
        name = name if name.isidentifier() else repr(name)
        return ApiError(400, f"unknown parameter {name[:100]}", name[:100], "unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{name} is missing", name, "missing_required_parameter")
    value = repr(error["input"])
    value = value if len(value) <= 100 else value[:100] + "..."
    cure = error["msg"].removeprefix("Input ").removeprefix("should be ")
    return ApiError(400, f"{name} is {value}: it should be {cure}", name, "invalid_value")


def answer_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape, and no trace of the stack."""

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return _explain(error.errors()[0]).response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return ApiError(error.status_code, message).response(dict(error.headers or {}))

    @app.exception_handler(Overloaded)
    async def on_overload(request: Request, error: Overloaded) -> JSONResponse:
        answer = ApiError(503, "too many images are waiting: try again shortly", None, "overloaded")
        return answer.response({"retry-after": "1"})

    @app.exception_handler(PromptTooLong)
    async def on_long_prompt(request: Request, error: PromptTooLong) -> JSONResponse:
        return ApiError(400, error.message, error.message.split()[0], "string_above_max_length").response()

    @app.exception_handler(Exception)
    async def on_failure(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "drawing failed: the server's log says why", None, "internal_error").response()


class LimitBody:
    """ASGI middleware: 413 for bodies that are too large, before they are read into memory."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has gone
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > self._max_bytes:
                text = f"the body has more than {self._max_bytes} bytes: send less"
                await ApiError(413, text, None, "request_too_large").response()(scope, receive, send)
                return
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)
