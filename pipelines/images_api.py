"""The HTTP endpoint in the shape of OpenAI's Images API, as a FastAPI app over any image source.

A prompt names a class, or is a prompt where the model takes text. What OpenAI's API has and these models
have no use for (quality, style, user, ...) is accepted and ignored; what that API does not know is refused,
as there, so that a misspelt `sed` is not passed over in silence.
"""

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

import harmonica
from harmonica.labels import UnknownClass, find_class
from pipelines.drawing import Drawing, Row
from pipelines.http_errors import ApiError, LimitBody, Overloaded, answer_errors

MAX_BODY_BYTES = 64 * 1024
MAX_PROMPT_LENGTH = 4096
MAX_SEED = 2**62
# JavaScript reads integers above this inexactly, and then cannot ask for the same image again.
_RANDOM_SEEDS = 2**53
_HEALTH_TIMEOUT_S = 2.0


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What is served."""

    model: str
    router_version: str
    cur: float
    class_names: tuple[str, ...]
    """Empty where the model takes text."""
    image_size: int
    max_images: int
    """Upper bound of `n`."""

    @property
    def size(self) -> str:
        return f"{self.image_size}x{self.image_size}"


class ImageSource(Protocol):
    """Where images come from: Serve replicas, or the same code in this process."""

    async def describe(self) -> ModelCard: ...

    async def draw(self, row: Row) -> Drawing: ...


class GenerateRequest(BaseModel):
    """Body of `POST /v1/images/generations`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(
        min_length=1,
        max_length=MAX_PROMPT_LENGTH,
        description="What to draw; of a class-conditional model, a class name or number.",
    )
    negative_prompt: str | None = Field(
        None, max_length=MAX_PROMPT_LENGTH, description="What not to draw, for models that take text."
    )
    model: str | None = Field(None, description="The served model, or nothing.")
    n: int | None = Field(1, ge=1, description="Number of images.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Same seed, same images. Absent: random.")
    size: str | None = Field("auto", description="`auto`, or the model's own size.")
    response_format: Literal["b64_json"] | None = "b64_json"
    output_format: Literal["png"] | None = "png"
    stream: Literal[False] | None = False
    user: Any = Field(None, description="Ignored, like the fields below.")
    quality: Any = None
    style: Any = None
    background: Any = None
    moderation: Any = None
    output_compression: Any = None
    partial_images: Any = None


class ImageData(BaseModel):
    """One image."""

    b64_json: str
    revised_prompt: str
    """The class's own name, or the prompt as it was."""


class GenerateResponse(BaseModel):
    """OpenAI's `ImagesResponse`, and how the images came about."""

    created: int
    data: list[ImageData]
    output_format: Literal["png"] = "png"
    size: str
    seed: int
    router_version: str
    cur: float
    batch_size: int
    """Images that shared the trajectory, other requests' among them."""
    inference_time_s: float
    """Of the trajectory; of the longest, where the images took several."""


def _check(body: GenerateRequest, card: ModelCard) -> int | str:
    """The label or the prompt; refuses what this model cannot do."""
    if body.model not in (None, "", card.model):
        message = f"model is {body.model!r}: this endpoint serves {card.model!r}, give that or leave it out"
        raise ApiError(404, message, "model", "model_not_found")
    if (body.n or 1) > card.max_images:
        raise ApiError(400, f"n is {body.n}: give 1 to {card.max_images}", "n", "integer_above_max_value")
    if body.size not in (None, "auto", card.size):
        message = f"size is {body.size!r}: this model draws {card.size}, give that or 'auto'"
        raise ApiError(400, message, "size", "invalid_value")
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


async def _draw(source: ImageSource, rows: list[Row]) -> list[Drawing]:
    """All rows, each on its own, so that they share trajectories with other requests' rows."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(source.draw(row)) for row in rows]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def create_app(source: ImageSource) -> FastAPI:
    """The endpoint over a source, which is asked what it serves when the app starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.card = await source.describe()
        yield

    app = FastAPI(title="HarmoniCa", version=harmonica.__version__, lifespan=lifespan)
    app.add_middleware(LimitBody, max_bytes=MAX_BODY_BYTES)
    answer_errors(app)

    def card() -> ModelCard:
        return app.state.card

    def model_entry() -> dict[str, Any]:
        served = card()
        return {
            "id": served.model,
            "object": "model",
            "created": 0,
            "owned_by": "harmonica",
            "size": served.size,
            "class_names": served.class_names,
        }

    @app.post("/v1/images/generations", response_model=GenerateResponse)
    async def generate(body: GenerateRequest) -> GenerateResponse:
        subject, unwanted = _check(body, card()), body.negative_prompt or ""
        seed = secrets.randbelow(_RANDOM_SEEDS) if body.seed is None else body.seed
        rows = [Row(subject, seed, index, unwanted) for index in range(body.n or 1)]
        drawings = await _draw(source, rows)
        longest = max(drawings, key=lambda drawing: drawing.seconds)
        name = subject if isinstance(subject, str) else card().class_names[subject]
        return GenerateResponse(
            created=int(time.time()),
            data=[
                ImageData(b64_json=base64.b64encode(drawing.png).decode(), revised_prompt=name)
                for drawing in drawings
            ],
            size=card().size,
            seed=seed,
            router_version=longest.router_version,
            cur=longest.cur,
            batch_size=max(drawing.batch_size for drawing in drawings),
            inference_time_s=round(longest.seconds, 4),
        )

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_entry()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        if model != card().model:
            message = f"model is {model[:100]!r}: this endpoint serves {card().model!r}"
            raise ApiError(404, message, "model", "model_not_found")
        return model_entry()

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        status = "ok"
        try:
            app.state.card = await asyncio.wait_for(source.describe(), _HEALTH_TIMEOUT_S)
        except (TimeoutError, Overloaded):
            status = "busy"  # and the card is the last one known
        served = card()
        return {
            "status": status,
            "model": served.model,
            "router_version": served.router_version,
            "cur": served.cur,
        }

    return app
