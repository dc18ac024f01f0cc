"""The page of the HTTP API, made from the OpenAPI document of the endpoint itself."""

from collections.abc import Iterator
from typing import Any

_INTRODUCTION = """# HTTP API

The endpoint has the shape of OpenAI's Images API. This page is generated from its OpenAPI document, which a
running endpoint serves as `/openapi.json`, and as an interactive page under `/docs`.
[Serve a router](../guides/serve.md) says how the fields work together.
"""


def _anchor(name: str) -> str:
    return name.strip("_").lower()


def _type(schema: dict[str, Any]) -> str:
    """Return a schema's type in words, with a link to the schema that it refers to."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name.strip('_')}](#{_anchor(name)})"
    if "const" in schema:
        return f"`{schema['const']!r}`".replace("'", '"')
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(part) for part in schema[key]))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"array of {_type(schema.get('items', {}))}"
    bounds = [
        f"{words} {schema[key]}"
        for key, words in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
            ("minLength", "length at least"),
            ("maxLength", "length at most"),
        )
        if key in schema
    ]
    return ", ".join([str(kind), *bounds])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _fields(schema: dict[str, Any]) -> Iterator[str]:
    properties, required = schema.get("properties", {}), set(schema.get("required", ()))
    if not properties:
        return
    yield "| field | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in properties.items():
        default = "required" if name in required else f"`{field['default']!r}`" if "default" in field else ""
        meaning = _cell(field.get("description", ""))
        yield f"| `{name}` | {_cell(_type(field))} | {default} | {meaning} |"
    yield ""


def _operation(path: str, method: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"## `{method.upper()} {path}`"
    yield ""
    yield operation.get("description") or operation.get("summary", "")
    yield ""
    body = operation.get("requestBody", {}).get("content", {})
    for kind, content in body.items():
        yield f"The request's body is {_type(content['schema'])}, as `{kind}`."
        yield ""
    for parameter in operation.get("parameters", ()):
        yield f"`{parameter['name']}` ({parameter['in']}): {_type(parameter['schema'])}."
        yield ""
    yield "| status | meaning | body |"
    yield "|---|---|---|"
    for status, response in operation["responses"].items():
        bodies = [
            "server-sent events" if kind == "text/event-stream" else _type(content.get("schema", {}))
            for kind, content in response.get("content", {}).items()
        ]
        yield f"| {status} | {_cell(response['description'])} | {' or '.join(bodies)} |"
    yield ""


def describe() -> str:
    """Return the page in Markdown."""
    from pipelines.serving.images_api import create_app

    # The document does not depend on what is served: no image source is asked.
    document = create_app(None, keys=("documented",)).openapi()  # type: ignore[arg-type]
    lines = [_INTRODUCTION]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            lines += _operation(path, method, operation)
    lines += ["## Schemas", ""]
    for name, schema in sorted(document["components"]["schemas"].items(), key=lambda item: _anchor(item[0])):
        lines += [f"### {name.strip('_')} {{#{_anchor(name)}}}", "", schema.get("description", ""), ""]
        lines += _fields(schema)
    return "\n".join(lines) + "\n"
