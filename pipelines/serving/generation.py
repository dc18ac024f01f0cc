"""From the body of a request to orders, and from drawings to the answer."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pydantic import BaseModel

from harmonica.data.class_names import UnknownClass, find_class
from harmonica.evaluation.plots import PictureFormat
from pipelines.serving import schemas as api
from pipelines.serving.api_requests import GenerateRequest
from pipelines.serving.http_errors import ApiError
from pipelines.serving.image_sampler import Row
from pipelines.serving.requests import Drawing, ImageSource, ModelCard, Order, Preview, Progress
from pipelines.serving.server_sent_events import merge

_MAX_ECHO = 100
_MAX_UNKNOWN = 20
"""Names in an answer."""


def check(
    body: GenerateRequest, card: ModelCard, *, lenient: bool = False
) -> tuple[int | str, list[api.Warned]]:
    """The label or the prompt, and what will not be followed; refuses what this model cannot do.

    Args:
        lenient: another model or size, a URL, and what is not known are warned of and not refused.
    """
    warnings = _settle(body, card, lenient=lenient)
    if (body.n or 1) > card.max_images:
        raise ApiError(400, f"n is {body.n}: give 1 to {card.max_images}", "n", "integer_above_max_value")
    if body.output_format in (None, "png") and body.output_compression not in (None, 100):
        message = f"output_compression is {body.output_compression} and png loses nothing: give jpeg or webp"
        raise ApiError(400, message, "output_compression", "invalid_value")
    for name in ("partial_images", "progress"):
        if getattr(body, name) and not body.stream:
            message = f"{name} is {getattr(body, name)} and nothing is streamed: set stream, or leave it out"
            raise ApiError(400, message, name, "invalid_value")
    if not any(letter.isprintable() and not letter.isspace() for letter in body.prompt):
        message = f"prompt is {body.prompt[:20]!r}, which is blank: say what to draw"
        raise ApiError(400, message, "prompt", "invalid_value")
    if not card.class_names:
        return body.prompt, warnings
    if body.negative_prompt:
        message = f"negative_prompt is set and {card.model!r} draws classes: leave it out"
        raise ApiError(400, message, "negative_prompt", "invalid_value")
    try:
        return find_class(body.prompt, card.class_names), warnings
    except UnknownClass as error:
        message = f"prompt is {error}; GET /v1/models lists the classes"
        raise ApiError(400, message, "prompt", error.code) from error


def _settle(body: GenerateRequest, card: ModelCard, *, lenient: bool) -> list[api.Warned]:
    """What clients of other endpoints send whatever they talk to: warned of, or refused.

    Raises:
        ApiError: another model or size, where the endpoint is not lenient.
    """
    warnings: list[api.Warned] = []
    if body.model not in (None, "", card.model):
        asked = f"model is {body.model[:_MAX_ECHO]!r}: this endpoint serves {card.model!r}"
        if not lenient:
            raise ApiError(404, f"{asked}, give that or leave it out", "model", "model_not_found")
        warnings.append(api.Warned(param="model", message=f"{asked}, which has drawn"))
    if body.size not in (None, "auto", card.size):
        asked = f"size is {body.size[:_MAX_ECHO]!r}: this model draws {card.size}"
        if not lenient:
            raise ApiError(400, f"{asked}, give that or 'auto'", "size", "invalid_value")
        warnings.append(api.Warned(param="size", message=f"{asked}, and has drawn that"))
    if body.wants_url:
        kept = "this endpoint keeps no pictures"
        message = f"response_format is 'url': {kept}, so url is a data URL that holds the picture"
        if body.stream:
            message = f"response_format is 'url': {kept}, and events hold b64_json"
        warnings.append(api.Warned(param="response_format", message=message))
    for name in list(body.model_extra or ())[:_MAX_UNKNOWN]:
        name = name[:_MAX_ECHO]
        warnings.append(api.Warned(param=name, message=f"{name!r} is no parameter of this endpoint"))
    return warnings


def orders_of(body: GenerateRequest, subject: int | str, seed: int) -> list[Order]:
    """An image each, so that they share trajectories with other requests' images."""
    return [
        Order(
            Row(subject, seed, index, body.negative_prompt or "", body.guidance_scale),
            body.drawn_quality,
            num_inference_steps=body.num_inference_steps,
            company=body.n or 1,
            timeout_s=body.timeout_s,
            output_format=body.output_format or "png",
            output_compression=100 if body.output_compression is None else body.output_compression,
            partial_images=body.partial_images or 0,
            progress=bool(body.progress),
        )
        for index in range(body.n or 1)
    ]


async def draw_all(source: ImageSource, orders: Sequence[Order]) -> list[Drawing]:
    """All, or the first error, with the rest taken out of the queue."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(source.draw(order)) for order in orders]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _as_base64(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def as_image(picture: bytes, kind: PictureFormat, name: str, *, as_url: bool) -> api.ImageData:
    """An entry of the answer's `data`; as a URL, one that holds the picture itself."""
    encoded = _as_base64(picture)
    if as_url:
        return api.ImageData(url=f"data:image/{kind};base64,{encoded}", revised_prompt=name)
    return api.ImageData(b64_json=encoded, revised_prompt=name)


def making(seed: int, drawings: Sequence[Drawing]) -> dict[str, Any]:
    """The fields of `Making`."""
    longest = max(drawings, key=lambda drawing: drawing.seconds)
    return {
        "seed": seed,
        "router_version": longest.router_version,
        "cur": longest.cur,
        "num_inference_steps": longest.num_inference_steps,
        "guidance_scale": longest.guidance_scale,
        "batch_size": max(drawing.batch_size for drawing in drawings),
        "inference_time_s": round(longest.seconds, 4),
    }


async def events_of(
    source: ImageSource, orders: Sequence[Order], size: str, name: str, warnings: Sequence[api.Warned] = ()
) -> AsyncIterator[BaseModel]:
    """What happens to the orders, as bodies of server-sent events."""
    async for index, event in merge([source.watch(order) for order in orders]):
        order = orders[index]
        about: dict[str, Any] = {"created_at": int(time.time()), "index": index}
        if isinstance(event, Progress):
            yield api.ProgressEvent(**about, step=event.step, num_inference_steps=event.num_steps)
            continue
        about |= {"output_format": order.output_format, "quality": order.quality, "size": size}
        about["b64_json"] = _as_base64(event.picture)
        if isinstance(event, Preview):
            about |= {"step": event.step, "num_inference_steps": event.num_steps}
            yield api.PartialImageEvent(**about, partial_image_index=event.index)
        else:
            about |= {"revised_prompt": name, "warnings": warnings}
            yield api.CompletedEvent(**about, **making(order.row.seed, [event]))
