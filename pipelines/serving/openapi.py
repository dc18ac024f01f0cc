"""Complete the endpoint's OpenAPI document by errors and events."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from .api_requests import EditRequest
from .schemas import CompletedEvent, ErrorBody, PartialImageEvent, ProgressEvent

_REASONS = {
    400: "A field is unknown or has a value that cannot be used.",
    401: "The endpoint has keys, and the request sends none of them.",
    403: "A page of another site has sent it.",
    404: "There is no such model.",
    408: "The body was not complete in time.",
    413: "The body is too large.",
    500: "Generating the image failed.",
    503: "Too many images are waiting, or the model could not be loaded.",
    504: "The image has waited for too long.",
}
_EDIT_FORM = "EditForm"
EDIT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": {"$ref": f"#/components/schemas/{_EDIT_FORM}"}},
        },
    }
}
"""`openapi_extra=` of the route that edits pictures."""
_EVENTS = (PartialImageEvent, ProgressEvent, CompletedEvent)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return `responses=` of a route that may answer these errors."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": _REASONS[status]} for status in statuses
    }
    if 503 in found:
        seconds = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
        found[503]["headers"] = {"Retry-After": seconds}
    return found


def _event(kind: str, body: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of a server-sent event, whose data is JSON in a string."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": f"#/components/schemas/{body.__name__}"},
    }
    properties = {"event": {"const": kind}, "data": data}
    return {"type": "object", "required": ["event", "data"], "properties": properties}


def events() -> dict[int | str, dict[str, Any]]:
    """Return `responses=` of a route that may answer with a stream of events."""
    described = [_event(event.model_fields["type"].default, event) for event in _EVENTS]
    described.append(_event("error", ErrorBody))
    return {200: {"content": {"text/event-stream": {"schema": {"oneOf": described}}}}}


def _edit_form() -> dict[str, Any]:
    """Return the schema of a form with pictures."""
    schema = EditRequest.model_json_schema()
    files = {"type": "string", "contentMediaType": "application/octet-stream"}
    image = {
        "anyOf": [files, {"type": "array", "items": files}],
        "description": "A png, jpeg or webp file, or several as `image[]` where the model takes several.",
    }
    return schema | {
        "title": _EDIT_FORM,
        "properties": {"image": image} | schema["properties"],
        "required": ["image", *schema["required"]],
    }


def describe_fully(app: FastAPI) -> None:
    """Replace FastAPI's document by one that is complete.

    FastAPI's own has 422 answers, which are never given, and lacks events.
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            schemas = made["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            schemas[_EDIT_FORM] = _edit_form()
            for event in _EVENTS:
                schema = event.model_json_schema(
                    ref_template="#/components/schemas/{model}", mode="serialization"
                )
                schemas |= schema.pop("$defs", {}) | {event.__name__: schema}
            for operations in made["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
