"""Answer errors in OpenAI's shape: `{"error": {message, type, param, code}}`."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from harmonica.data.text_encoder import PromptTooLong

from .batching import Overloaded, TimedOut
from .image_request import SettingRejected
from .request_ids import HEADER, with_request_id
from .requests import REJECTIONS, ModelUnavailable
from .schemas import ErrorBody, ErrorDetail

_MAX_ECHO = 100
_CODES = {404: "unknown_url", 405: "method_not_allowed"}


class ApiError(Exception):
    """An error that is answered in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self._headers = headers

    def body(self) -> ErrorBody:
        """Return the body of the answer."""
        return ErrorBody(
            error=ErrorDetail(
                message=self.message,
                type="invalid_request_error" if self.status < 500 else "server_error",
                param=self.param,
                code=self.code,
            )
        )

    def response(self) -> JSONResponse:
        """Return the answer, with its status and headers."""
        return JSONResponse(self.body().model_dump(), self.status, self._headers)


def as_api_error(error: Exception) -> ApiError:
    """Map an exception to the error that the client is shown.

    Internal details are not exposed.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        headers = {"retry-after": str(error.retry_after_s)}
        message = f"too many images are waiting: try again in {error.retry_after_s} s"
        return ApiError(503, message, None, "overloaded", headers)
    if isinstance(error, ModelUnavailable):
        headers = {"retry-after": str(error.retry_after_s)}
        message = (
            f"model {error.model!r} could not be loaded: ask for another one, which GET /v1/models lists, or "
            f"try again in {error.retry_after_s} s (GET /healthz says why)"
        )
        return ApiError(503, message, "model", "model_unavailable", headers)
    if isinstance(error, TimedOut):
        message = "the image has waited for as long as it may: try again, or give a larger timeout_s"
        return ApiError(504, message, None, "timeout")
    if isinstance(error, PromptTooLong):
        return ApiError(400, error.message, error.field, "string_above_max_length")
    if isinstance(error, SettingRejected):
        return ApiError(400, error.message, error.field, "invalid_value")
    return ApiError(500, "generating failed: the server's log says why", None, "internal_error")


def _explain(error: Any) -> ApiError:
    """Turn pydantic's validation error into a message with field, value and cure."""
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
    value = value if len(value) <= _MAX_ECHO else value[:_MAX_ECHO] + "..."
    cure = error["msg"].removeprefix("Input ").removeprefix("should be ")
    return ApiError(400, f"{name} is {value}: it should be {cure}", name, "invalid_value")


def answer_errors(app: FastAPI) -> None:
    """Answer every error in OpenAI's shape and without a stack trace."""

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return _explain(error.errors()[0]).response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        headers = {name.lower(): value for name, value in (error.headers or {}).items()}
        if "GET" in headers.get("allow", ""):
            headers["allow"] += ", HEAD"  # which `NormalizePath` answers
        code = _CODES.get(error.status_code, "invalid_request")
        return ApiError(error.status_code, message, None, code, headers).response()

    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    # The handler of Exception raises the error again after it has answered; handlers of named kinds do not.
    for kind in (ApiError, *REJECTIONS, Exception):
        app.add_exception_handler(kind, on_error)


class AssignRequestId:
    """ASGI middleware adds X-Request-Id to every answer.

    It has the client's own id if that is valid, else a new one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, request_id = with_request_id(scope["headers"])

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (HEADER, request_id)]}
            await send(message)

        await self._app({**scope, "headers": headers}, receive, named)
