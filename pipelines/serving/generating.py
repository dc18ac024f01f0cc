"""From the body of a request to orders, and from drawings to the answer."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pydantic import BaseModel

from harmonica.text.labels import UnknownClass, find_class
from pipelines.serving import api_models as api
from pipelines.serving.drawing import Row
from pipelines.serving.http_errors import ApiError
from pipelines.serving.orders import Drawing, ImageSource, ModelCard, Order, Preview, Progress
from pipelines.serving.streaming import merge


def check(body: api.GenerateRequest, card: ModelCard) -> int | str:
    """The label or the prompt; refuses what this model cannot do."""
    if body.model not in (None, "", card.model):
        message = f"model is {body.model!r}: this endpoint serves {card.model!r}, give that or leave it out"
        raise ApiError(404, message, "model", "model_not_found")
    if (body.n or 1) > card.max_images:
        raise ApiError(400, f"n is {body.n}: give 1 to {card.max_images}", "n", "integer_above_max_value")
    if body.size not in (None, "auto", card.size):
        message = f"size is {body.size!r}: this model draws {card.size}, give that or 'auto'"
        raise ApiError(400, message, "size", "invalid_value")
    if body.output_format in (None, "png") and body.output_compression not in (None, 100):
        message = f"output_compression is {body.output_compression} and png loses nothing: give jpeg or webp"
        raise ApiError(400, message, "output_compression", "invalid_value")
    for name in ("partial_images", "progress"):
        if getattr(body, name) and not body.stream:
            message = f"{name} is {getattr(body, name)} and nothing is streamed: set stream, or leave it out"
            raise ApiError(400, message, name, "invalid_value")
    if not card.class_names:
        return body.prompt
    if body.negative_prompt:
        message = f"negative_prompt is set and {card.model!r} draws classes: leave it out"
        raise ApiError(400, message, "negative_prompt", "invalid_value")
    try:
        return find_class(body.prompt, card.class_names)
    except UnknownClass as error:
        message = f"prompt is {error}; GET /v1/models lists the classes"
        raise ApiError(400, message, "prompt", error.code) from error


def orders_of(body: api.GenerateRequest, subject: int | str, seed: int) -> list[Order]:
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


def as_base64(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


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
    source: ImageSource, orders: Sequence[Order], size: str, name: str
) -> AsyncIterator[BaseModel]:
    """What happens to the orders, as bodies of server-sent events."""
    async for index, event in merge([source.watch(order) for order in orders]):
        order = orders[index]
        about: dict[str, Any] = {"created_at": int(time.time()), "index": index}
        if isinstance(event, Progress):
            yield api.ProgressEvent(**about, step=event.step, num_inference_steps=event.num_steps)
            continue
        about |= {"output_format": order.output_format, "quality": order.quality, "size": size}
        about["b64_json"] = as_base64(event.picture)
        if isinstance(event, Preview):
            about |= {"step": event.step, "num_inference_steps": event.num_steps}
            yield api.PartialImageEvent(**about, partial_image_index=event.index)
        else:
            yield api.CompletedEvent(**about, **making(order.row.seed, [event]), revised_prompt=name)
