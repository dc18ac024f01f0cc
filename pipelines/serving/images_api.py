"""The HTTP endpoint in the shape of OpenAI's Images API, as a FastAPI app over any image source.

A prompt names a class, or is a prompt where the model takes text. What OpenAI's API has and these models
have no use for (style, user, ...) is accepted and ignored; what that API does not know is refused, as
there, so that a misspelt `sed` is not passed over in silence.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib import resources

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, Response

import harmonica
from pipelines.serving import schemas as api
from pipelines.serving.api_requests import GenerateRequest, LenientGenerateRequest
from pipelines.serving.auth import RequireKey
from pipelines.serving.batching import Overloaded
from pipelines.serving.generation import as_image, check, draw_all, events_of, making, orders_of
from pipelines.serving.http_errors import ApiError, NameRequest, answer_errors
from pipelines.serving.openapi import describe_fully, errors, events
from pipelines.serving.paths import SettlePath
from pipelines.serving.request_bodies import ReadBody, StrictJsonRoute
from pipelines.serving.requests import ImageSource, ModelCard
from pipelines.serving.server_sent_events import stream_events

MAX_BODY_BYTES = 64 * 1024
# JavaScript reads integers above this inexactly, and then cannot ask for the same image again.
_RANDOM_SEEDS = 2**53
_HEALTH_TIMEOUT_S = 2.0
# The page is one file: nothing else may be loaded by it, and nobody may frame it.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(
    source: ImageSource,
    keys: tuple[str, ...] = (),
    *,
    cors_origins: Sequence[str] = (),
    names_requests: bool = True,
    lenient: bool = False,
    read_timeout_s: float = 30.0,
) -> FastAPI:
    """The endpoint over a source, which is asked what it serves when the app starts.

    Args:
        keys: bearer keys, one of which every request to `/v1` has to bring; none: anybody may ask.
        cors_origins: sites whose pages may ask.
        names_requests: answer X-Request-Id, unless a proxy in front does.
        lenient: draw what the model can where a client asks for another model, size or kind of answer, or
            for what is not known here, and say so in the answer.
        read_timeout_s: how long a client may take to send a body.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.card = await source.describe()
        yield

    app = FastAPI(
        title="HarmoniCa",
        version=harmonica.__version__,
        lifespan=lifespan,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
    )
    app.router.route_class = StrictJsonRoute
    app.add_middleware(ReadBody, max_bytes=MAX_BODY_BYTES, timeout_s=read_timeout_s)
    if keys:
        app.add_middleware(RequireKey, keys=keys)
    if cors_origins:  # outside of the keys: a browser asks beforehand, and without any
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type", "x-request-id"),
            expose_headers=("retry-after", "x-request-id"),
        )
    app.add_middleware(SettlePath)  # outside of the keys, which go by the path
    if names_requests:
        app.add_middleware(NameRequest)
    answer_errors(app)
    describe_fully(app, has_keys=bool(keys))
    page = resources.files("pipelines.serving").joinpath("page.html").read_text(encoding="utf-8")

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

    async def generate(body: GenerateRequest) -> Response | api.GenerateResponse:
        """Draw images; with `stream`, show them while they are drawn."""
        served = card()
        subject, warnings = check(body, served, lenient=lenient)
        name = subject if isinstance(subject, str) else served.class_names[subject]
        seed = secrets.randbelow(_RANDOM_SEEDS) if body.seed is None else body.seed
        orders = orders_of(body, subject, seed)
        if body.stream:
            return await stream_events(events_of(source, orders, served.size, name, warnings))
        drawings = await draw_all(source, orders)
        kind = orders[0].output_format
        return api.GenerateResponse(
            created=int(time.time()),
            data=[as_image(drawing.picture, kind, name, as_url=body.wants_url) for drawing in drawings],
            output_format=kind,
            quality=orders[0].quality,
            size=served.size,
            warnings=warnings,
            **making(seed, drawings),
        )

    async def generate_leniently(body: LenientGenerateRequest) -> Response | api.GenerateResponse:
        """Draw images; with `stream`, show them while they are drawn. `warnings` says what was not done."""
        return await generate(body)

    app.post(
        "/v1/images/generations",
        response_model=api.GenerateResponse,
        response_model_exclude_none=True,
        responses=events() | errors(400, 401, 404, 408, 413, 500, 503, 504),
    )(generate_leniently if lenient else generate)

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

    @app.get("/health", include_in_schema=False)
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

    @app.get("/readyz", responses=errors(503))
    async def readyz() -> api.Ready:
        """Whether a request would be drawn now: 503 where no sampler answers or its queue is full."""
        if not await refreshed() or card().is_full:
            raise ApiError(503, "no image can be taken now", None, "not_ready", {"retry-after": "1"})
        return api.Ready()

    @app.get("/livez")
    async def livez() -> api.Live:
        """Whether this process answers; says nothing of the samplers."""
        return api.Live()

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": _PAGE_POLICY})

    return app
