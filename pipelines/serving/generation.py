"""Translate between the HTTP API and the engine.

A body becomes requests to the engine, and generated images become an answer.
"""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pydantic import BaseModel

from harmonica.data.class_names import UnknownClass, find_class
from harmonica.evaluation.plots import PictureFormat

from . import schemas as api
from .api_requests import GenerateRequest
from .http_errors import ApiError
from .image_request import ImageRequest, Picture, SettingRejected
from .requests import (
    EngineRequest,
    GeneratedImage,
    ImageSource,
    ModelCard,
    Preview,
    Progress,
)
from .server_sent_events import merge

_MAX_ECHO = 100
_MAX_UNKNOWN = 20
"""Largest number of unknown fields that an answer warns of."""


def check(
    body: GenerateRequest, card: ModelCard, *, lenient: bool = False, num_pictures: int = 0
) -> tuple[int | str, list[api.Warned]]:
    """Check a body against the model that is to generate.

    Args:
        body: the request as it was parsed.
        card: description of that model.
        lenient: warn of another size, of a URL and of unknown fields, in place of rejecting them.
        num_pictures: number of pictures to edit.

    Returns:
        The class label or the prompt, and the warnings.

    Raises:
        ApiError: the model cannot do what is asked.
    """
    warnings = _unsupported(body, card, lenient=lenient)
    _check_pictures(body, card, num_pictures)
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
        message = f"prompt is {body.prompt[:20]!r}, which is blank: say what to generate"
        raise ApiError(400, message, "prompt", "invalid_value")
    if not card.class_names:
        return body.prompt, warnings
    if body.negative_prompt:
        message = f"negative_prompt is set and {card.model!r} generates classes: leave it out"
        raise ApiError(400, message, "negative_prompt", "invalid_value")
    try:
        return find_class(body.prompt, card.class_names), warnings
    except UnknownClass as error:
        message = f"prompt is {error}; GET /v1/models lists the classes"
        raise ApiError(400, message, "prompt", error.code) from error


def _unsupported(body: GenerateRequest, card: ModelCard, *, lenient: bool) -> list[api.Warned]:
    """Return warnings of the fields that this endpoint cannot follow.

    Clients of other endpoints send them.

    Raises:
        ApiError: the body asks for another size, and the endpoint is not lenient.
    """
    warnings: list[api.Warned] = []
    if card.sizes is not None:
        try:
            card.sizes.parse(body.size) if body.size not in (None, "auto") else None
        except SettingRejected as error:
            if not lenient:
                raise
            warnings.append(api.Warned(param="size", message=error.message))
    elif body.size not in (None, "auto", card.size):
        asked = f"size is {body.size[:_MAX_ECHO]!r}: this model generates {card.size}"
        if not lenient:
            raise ApiError(400, f"{asked}, give that or 'auto'", "size", "invalid_value")
        warnings.append(api.Warned(param="size", message=f"{asked}, and has generated that"))
    if body.partial_images and not card.has_previews:
        asked = f"partial_images is {body.partial_images} and {card.model!r} has no previews"
        if not lenient:
            raise ApiError(400, f"{asked}: leave it out", "partial_images", "invalid_value")
        warnings.append(api.Warned(param="partial_images", message=asked))
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


def _check_pictures(body: GenerateRequest, card: ModelCard, num_pictures: int) -> None:
    if num_pictures > card.max_pictures:
        cure = (
            f"give at most {card.max_pictures}"
            if card.max_pictures
            else "leave it out, and POST to /v1/images/generations"
        )
        message = f"image is there {num_pictures} times and {card.model!r} takes {card.max_pictures}: {cure}"
        raise ApiError(400, message, "image", "invalid_value")
    if card.needs_pictures and not num_pictures:
        message = f"image is missing and {card.model!r} edits pictures: POST one to /v1/images/edits"
        raise ApiError(400, message, "image", "missing_required_parameter")


def _size(body: GenerateRequest, card: ModelCard) -> tuple[int, int] | None:
    """Return the size asked for, or None for the model's own.

    A size that has been warned of is None too.
    """
    if card.sizes is None or body.size in (None, "auto"):
        return None
    try:
        return card.sizes.parse(body.size)
    except SettingRejected:
        return None


def make_requests(
    body: GenerateRequest,
    subject: int | str,
    seed: int,
    card: ModelCard,
    pictures: tuple[Picture, ...] = (),
) -> list[EngineRequest]:
    """Make one request for each image.

    The images then share trajectories with those of other clients.
    """
    size = _size(body, card)
    return [
        EngineRequest(
            ImageRequest(
                *(subject, seed, index, body.negative_prompt or "", body.guidance_scale, size, pictures)
            ),
            body.served_quality,
            num_inference_steps=body.num_inference_steps,
            group_size=body.n or 1,
            timeout_s=body.timeout_s,
            output_format=body.output_format or "png",
            output_compression=100 if body.output_compression is None else body.output_compression,
            partial_images=body.partial_images or 0,
            progress=bool(body.progress),
            model=card.model,
        )
        for index in range(body.n or 1)
    ]


async def generate_all(source: ImageSource, requests: Sequence[EngineRequest]) -> list[GeneratedImage]:
    """Generate all images.

    After the first error the other images leave the queue, and the error is raised.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(source.generate(request)) for request in requests]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _as_base64(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def as_image(image: GeneratedImage, kind: PictureFormat, name: str, *, as_url: bool) -> api.ImageData:
    """Make an entry of the answer's `data`, with a data URL or with base64."""
    encoded = _as_base64(image.picture)
    form = {"url": f"data:image/{kind};base64,{encoded}"} if as_url else {"b64_json": encoded}
    return api.ImageData(**form, revised_prompt=name, router_version=image.router_version)


def generation_details(seed: int, images: Sequence[GeneratedImage]) -> dict[str, Any]:
    """Return the fields of `GenerationDetails` for the images of one answer."""
    longest = max(images, key=lambda image: image.seconds)
    return {
        "seed": seed,
        "router_version": longest.router_version,
        "cur": longest.cur,
        "num_inference_steps": longest.num_inference_steps,
        "guidance_scale": longest.guidance_scale,
        "batch_size": max(image.batch_size for image in images),
        "inference_time_s": round(longest.seconds, 4),
    }


async def stream_bodies(
    source: ImageSource,
    requests: Sequence[EngineRequest],
    size: str,
    name: str,
    warnings: Sequence[api.Warned] = (),
) -> AsyncIterator[BaseModel]:
    """Generate images and yield their events as bodies of server-sent events."""
    async for index, event in merge([source.generate_stream(request) for request in requests]):
        request = requests[index]
        about: dict[str, Any] = {"created_at": int(time.time()), "index": index}
        if isinstance(event, Progress):
            yield api.ProgressEvent(**about, step=event.step, num_inference_steps=event.num_steps)
            continue
        about |= {"output_format": request.output_format, "quality": request.quality}
        about["size"] = event.size or size
        about["b64_json"] = _as_base64(event.picture)
        if isinstance(event, Preview):
            about |= {"step": event.step, "num_inference_steps": event.num_steps}
            yield api.PartialImageEvent(**about, partial_image_index=event.index)
        else:
            about |= {"revised_prompt": name, "warnings": warnings}
            yield api.CompletedEvent(**about, **generation_details(request.image.seed, [event]))
