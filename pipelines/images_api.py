"""The HTTP endpoint in the shape of OpenAI's Images API, as a FastAPI app over any image source.

A prompt names a class, or is a prompt where the model takes text. What OpenAI's API has and these models
have no use for (style, user, ...) is accepted and ignored; what that API does not know is refused, as
there, so that a misspelt `sed` is not passed over in silence.
"""

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel

import harmonica
from harmonica.labels import UnknownClass, find_class
from pipelines import api_models as api
from pipelines.batching import Overloaded
from pipelines.drawing import Row
from pipelines.http_errors import ApiError, LimitBody, answer_errors
from pipelines.keys import RequireKey
from pipelines.openapi import describe_fully, errors, events
from pipelines.orders import Drawing, ImageSource, ModelCard, Order, Preview, Progress
from pipelines.streaming import merge, stream_events

MAX_BODY_BYTES = 64 * 1024
# JavaScript reads integers above this inexactly, and then cannot ask for the same image again.
_RANDOM_SEEDS = 2**53
_HEALTH_TIMEOUT_S = 2.0
# The page is one file: nothing else may be loaded by it, and nobody may frame it.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _check(body: api.GenerateRequest, card: ModelCard) -> int | str:
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


def _orders(body: api.GenerateRequest, subject: int | str, seed: int) -> list[Order]:
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


async def _draw(source: ImageSource, orders: Sequence[Order]) -> list[Drawing]:
    """All, or the first error, with the rest taken out of the queue."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(source.draw(order)) for order in orders]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _base64(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def _making(seed: int, drawings: Sequence[Drawing]) -> dict[str, Any]:
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


async def _events(
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
        about["b64_json"] = _base64(event.picture)
        if isinstance(event, Preview):
            about |= {"step": event.step, "num_inference_steps": event.num_steps}
            yield api.PartialImageEvent(**about, partial_image_index=event.index)
        else:
            yield api.CompletedEvent(**about, **_making(order.row.seed, [event]), revised_prompt=name)


def create_app(source: ImageSource, keys: tuple[str, ...] = ()) -> FastAPI:
    """The endpoint over a source, which is asked what it serves when the app starts.

    Args:
        keys: bearer keys, one of which every request to `/v1` has to bring; none: anybody may ask.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.card = await source.describe()
        yield

    app = FastAPI(title="HarmoniCa", version=harmonica.__version__, lifespan=lifespan, redoc_url=None)
    app.add_middleware(LimitBody, max_bytes=MAX_BODY_BYTES)
    if keys:
        app.add_middleware(RequireKey, keys=keys)
    answer_errors(app)
    describe_fully(app, has_keys=bool(keys))
    page = resources.files("pipelines").joinpath("page.html").read_text(encoding="utf-8")

    def card() -> ModelCard:
        return app.state.card

    async def refreshed() -> bool:
        """Whether the source has answered; else the card is the last one known."""
        try:
            app.state.card = await asyncio.wait_for(source.describe(), _HEALTH_TIMEOUT_S)
        except (TimeoutError, Overloaded):
            return False
        return True

    def model_entry() -> api.Model:
        served = card()
        return api.Model(id=served.model, size=served.size, class_names=list(served.class_names))

    @app.post(
        "/v1/images/generations",
        response_model=api.GenerateResponse,
        responses=events() | errors(400, 401, 404, 413, 500, 503, 504),
    )
    async def generate(body: api.GenerateRequest) -> Response | api.GenerateResponse:
        """Draw images; with `stream`, show them while they are drawn."""
        served, subject = card(), _check(body, card())
        name = subject if isinstance(subject, str) else served.class_names[subject]
        orders = _orders(body, subject, secrets.randbelow(_RANDOM_SEEDS) if body.seed is None else body.seed)
        if body.stream:
            return await stream_events(_events(source, orders, served.size, name))
        drawings = await _draw(source, orders)
        return api.GenerateResponse(
            created=int(time.time()),
            data=[
                api.ImageData(b64_json=_base64(drawing.picture), revised_prompt=name) for drawing in drawings
            ],
            output_format=orders[0].output_format,
            quality=orders[0].quality,
            size=served.size,
            **_making(orders[0].row.seed, drawings),
        )

    @app.get("/v1/models", responses=errors(401))
    async def models() -> api.ModelList:
        """The served model."""
        return api.ModelList(data=[model_entry()])

    @app.get("/v1/models/{model:path}", responses=errors(401, 404))
    async def model(model: str) -> api.Model:
        """The served model, by its name."""
        if model != card().model:
            message = f"model is {model[:100]!r}: this endpoint serves {card().model!r}"
            raise ApiError(404, message, "model", "model_not_found")
        return model_entry()

    @app.get("/v1/routers", responses=errors(401))
    async def routers() -> api.RouterList:
        """What each quality is drawn under, step by step."""
        await refreshed()
        entries = [asdict(router) for router in card().routers]
        return api.RouterList(data=[api.RouterEntry(id=entry.pop("version"), **entry) for entry in entries])

    @app.get("/healthz")
    async def healthz() -> api.Health:
        """Whether it draws, and under which router; a champion that could not be taken up is `refused`."""
        has_answered = await refreshed()
        served = card()
        return api.Health(
            status="ok" if has_answered else "busy",
            model=served.model,
            router_version=served.router_version,
            cur=served.cur,
            waiting=served.waiting,
            refused=api.RefusedRouter(**asdict(served.refused)) if served.refused else None,
        )

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": _PAGE_POLICY})

    return app
