"""Make the HTTP endpoint: a FastAPI app in the shape of OpenAI's Images API.

The prompt of a class-conditional model is the name of a class. Parameters of OpenAI's API that these models
have no use for (style, user, ...) are accepted and ignored. Unknown parameters are rejected, as OpenAI does,
so that a misspelt `sed` does not go unnoticed.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response

import harmonica

from . import schemas as api
from .api_requests import GenerateRequest, LenientGenerateRequest
from .auth import BEARER, RequireKey
from .batching import Overloaded
from .first_description import describe_while_wanted
from .generation import (
    as_image,
    check,
    generate_all,
    generation_details,
    make_requests,
    stream_bodies,
)
from .http_errors import ApiError, AssignRequestId, answer_errors
from .model_choice import choose_model, unknown_model
from .model_entries import health, model_entry, router_entries
from .multipart import Part
from .openapi import EDIT_BODY, describe_fully, errors, events
from .page import add_documentation, add_page
from .paths import NormalizePath
from .request_bodies import ReadBody, StrictJsonRoute
from .requests import Catalog, ImageSource, ModelCard, ModelState
from .server_sent_events import stream_events
from .uploads import decode_pictures, read_form, refuse_other_sites

MAX_BODY_BYTES = 64 * 1024
# JavaScript reads integers above this inexactly, and then cannot ask for the same image again.
_RANDOM_SEEDS = 2**53
EDITS = "/images/edits"
_HEALTH_TIMEOUT_S = 2.0


def create_app(
    source: ImageSource,
    keys: tuple[str, ...] = (),
    *,
    is_wanted: Callable[[], bool] = lambda: True,
    cors_origins: Sequence[str] = (),
    assign_request_ids: bool = True,
    lenient: bool = False,
    read_timeout_s: float = 30.0,
    max_upload_bytes: int = 20 * 2**20,
) -> FastAPI:
    """Make the app of an endpoint; it asks the source what it serves when it starts.

    Args:
        source: generates the images.
        keys: bearer keys; every request to `/v1` has to bring one of them. Default: no key is needed.
        is_wanted: asked while the app waits for its source, which is given up where it returns False.
        cors_origins: web sites whose pages may send requests.
        assign_request_ids: answer X-Request-Id. False where a proxy in front does that.
        lenient: if a client asks for another model, size or kind of answer, or for an unknown field,
            generate what the model can and warn of it in the answer.
        read_timeout_s: how long a client may take to send a body.
        max_upload_bytes: largest body of a request that edits pictures.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.catalog = Catalog.of(await describe_while_wanted(source.describe, is_wanted))
        yield

    app = FastAPI(
        title="HarmoniCa",
        version=harmonica.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(
        ReadBody,
        max_bytes=MAX_BODY_BYTES,
        timeout_s=read_timeout_s,
        larger={EDITS: max_upload_bytes},
    )
    if keys:
        app.add_middleware(RequireKey, keys=keys)
    if cors_origins:  # outside of the keys: a browser's preflight request has none
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type", "x-request-id"),
            expose_headers=("retry-after", "x-request-id"),
        )
    app.add_middleware(NormalizePath)  # outside of the keys, which go by the path
    if assign_request_ids:
        app.add_middleware(AssignRequestId)
    answer_errors(app)
    describe_fully(app)
    v1 = APIRouter(prefix="/v1", route_class=StrictJsonRoute, dependencies=[Security(BEARER)] if keys else [])

    def catalog() -> Catalog:
        served: Catalog = app.state.catalog
        return served

    refreshing: asyncio.Task[bool] | None = None

    async def refresh() -> bool:
        try:
            app.state.catalog = Catalog.of(await asyncio.wait_for(source.describe(), _HEALTH_TIMEOUT_S))
        except (TimeoutError, Overloaded):
            return False
        return True

    async def refreshed() -> bool:
        """Refresh the catalog, and return whether the source has answered.

        If it has not, the last one stays. Those who ask at the same time get one answer: no key is needed
        for health, and each question would take the place of an image.
        """
        nonlocal refreshing
        if refreshing is None or refreshing.done():
            refreshing = asyncio.create_task(refresh())
        return await asyncio.shield(refreshing)  # a client that leaves does not end it for the others

    async def card_of(state: ModelState) -> ModelCard:
        """Return a model's card; one that never was loaded is tried again."""
        while state.card is None:
            app.state.catalog = Catalog.of(await source.describe(state.model))
            state = catalog().find(state.model) or catalog().states[0]
        return state.card

    async def answer(body: GenerateRequest, uploads: Sequence[Part] = ()) -> Response | api.GenerateResponse:
        state, unknown = choose_model(body, catalog(), lenient=lenient)
        served = await card_of(state)
        subject, warnings = check(body, served, lenient=lenient, num_pictures=len(uploads))
        warnings = unknown + warnings
        pictures = await decode_pictures(uploads) if uploads else ()
        name = subject if isinstance(subject, str) else served.class_names[subject]
        seed = secrets.randbelow(_RANDOM_SEEDS) if body.seed is None else body.seed
        requests = make_requests(body, subject, seed, served, pictures)
        if body.stream:
            return await stream_events(stream_bodies(source, requests, served.size, name, warnings))
        images = await generate_all(source, requests)
        kind = requests[0].output_format
        return api.GenerateResponse(
            created=int(time.time()),
            data=[as_image(image, kind, name, as_url=body.wants_url) for image in images],
            output_format=kind,
            quality=requests[0].quality,
            size=images[0].size or served.size,
            warnings=warnings,
            **generation_details(seed, images),
        )

    async def generate(body: GenerateRequest) -> Response | api.GenerateResponse:
        """Generate images; with `stream`, send previews and progress meanwhile."""
        return await answer(body)

    async def generate_leniently(body: LenientGenerateRequest) -> Response | api.GenerateResponse:
        """Generate images, as far as the model can.

        `warnings` names what was not followed.
        """
        return await answer(body)

    v1.post(
        "/images/generations",
        response_model=api.GenerateResponse,
        response_model_exclude_none=True,
        responses=events() | errors(400, 401, 404, 408, 413, 500, 503, 504),
    )(generate_leniently if lenient else generate)

    @v1.post(
        EDITS,
        response_model=api.GenerateResponse,
        response_model_exclude_none=True,
        responses=events() | errors(400, 401, 403, 404, 408, 413, 500, 503, 504),
        openapi_extra=EDIT_BODY,
    )
    async def edit(request: Request) -> Response | api.GenerateResponse:
        """Edit pictures by a prompt, where the model takes pictures.

        The form is that of OpenAI's client.
        """
        if not keys:
            refuse_other_sites(request, cors_origins)
        content_type = request.headers.get("content-type", "")
        form, uploads = read_form(content_type, await request.body(), lenient=lenient)
        return await answer(form, uploads)

    @v1.get("/models", responses=errors(401))
    async def models() -> api.ModelList:
        """List the served models."""
        return api.ModelList(data=[model_entry(state) for state in catalog().states])

    @v1.get("/models/{model:path}", responses=errors(401, 404))
    async def model(model: str) -> api.Model | api.UnavailableModel:
        """Return a served model by its name."""
        state = catalog().find(model)
        if state is None:
            raise unknown_model(model, catalog())
        return model_entry(state)

    @v1.get("/routers", responses=errors(401, 404))
    async def routers(model: str = "") -> api.RouterList:
        """List a model's routers and plans, with the qualities they are used for."""
        await refreshed()
        state = catalog().find(model) if model else catalog().states[0]
        if state is None:
            raise unknown_model(model, catalog())
        return api.RouterList(data=router_entries(state.card) if state.card else [])

    app.include_router(v1)

    @app.get("/health", include_in_schema=False)
    @app.get("/healthz")
    async def healthz() -> api.HealthOfSeveral | api.Health:
        """Return the state of the endpoint and its routers.

        `refused` is a champion that cannot be served.
        """
        has_answered = await refreshed()
        return health(catalog(), has_answered=has_answered)

    @app.get("/readyz", responses=errors(503))
    async def readyz() -> api.Ready:
        """Answer whether a request would be accepted now.

        The answer is 503 if no replica answers, or if its queue is full.
        """
        if not await refreshed() or catalog().is_full:
            raise ApiError(503, "no image can be taken now", None, "not_ready", {"retry-after": "1"})
        return api.Ready()

    @app.get("/livez")
    async def livez() -> api.Live:
        """Answer while this process runs.

        The state of the replicas that generate does not matter.
        """
        return api.Live()

    add_page(app)
    add_documentation(app)
    return app
