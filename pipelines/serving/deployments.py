"""Define the two deployments of Ray Serve, and the link between them.

`GenerationDeployment` holds the model and generates; the function of `api_builder` makes the app that serves
HTTP; `RemoteEngine` calls the former from the latter.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from harmonica.core.artifact import RouterArtifact
from harmonica.models.loading import ModelConfig, load_model
from harmonica.validation.settings import require

from ..config.serve import ServeConfig
from .auth import ENVIRONMENT, load_keys
from .batching import Overloaded
from .engine import GenerationEngine
from .first_router import deciding_router, from_registry
from .image_sampler import ImageSampler
from .images_api import create_app
from .metrics import ServeMetrics
from .planned_sampler import PlannedSampler
from .registry_watcher import RegistryWatcher, ServeArgs
from .requests import (
    REJECTIONS,
    EngineRequest,
    GeneratedImage,
    ModelCard,
    Preview,
    Progress,
)
from .servable_pipeline import servable_pipeline

GENERATION_DEPLOYMENT = "Sampler"
"""Name of `GenerationDeployment` in Serve: a label of its metrics, and a key in files of `serve build`."""
_LOST = (ActorDiedError, ActorUnavailableError)
_PAUSES_S = (0.0, 0.2, 0.5, 1.0, 2.0)
"""Pauses before a request is sent to another replica: after a node is lost, several calls may fail before
Serve notices."""


def make_sampler(
    model: ModelConfig, config: ServeConfig, router: RouterArtifact | None = None
) -> PlannedSampler[Any]:
    """Load what generates: a model with a branch file, or a diffusers pipeline.

    Args:
        router: the one to serve, which decides where a pipeline's transformer has a branch file.

    Raises:
        ValueError: the model cannot be loaded or cannot generate images, or settings that it does not follow.
    """
    device = "cuda" if config.use_gpu else "cpu"
    pipeline = servable_pipeline(model, router)
    if pipeline is None:
        loaded = load_model(model, device)
        return ImageSampler(loaded, device, over_limit=config.over_limit, max_steps=config.max_steps)
    require(
        config.over_limit == "truncate",
        "serve.over_limit",
        config.over_limit,
        "give truncate, since a diffusers pipeline reads as much of a prompt as it takes",
    )
    limits = {"max_steps": config.max_steps, "max_pixels": config.max_pixels}
    from .pipeline_sampler import PipelineSampler  # takes seconds to import, so not at the top

    return PipelineSampler(pipeline, model, device, **limits)


class GenerationDeployment:
    """A replica holds the model in a generation engine, and follows the registry."""

    async def __init__(self, args: ServeArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        config = args.serve
        torch.set_num_threads(max(1, int(config.num_cpus)))
        images = make_sampler(args.model, config, await deciding_router(args))
        self._engine = GenerationEngine(images, args.registered_model, config, ServeMetrics())
        watcher = RegistryWatcher(self._engine, args)
        await from_registry(watcher.poll)
        await self._engine.fix_batch_size()
        self._watching = asyncio.create_task(watcher.run()) if args.tracking_uri else None

    def check_health(self) -> None:
        """Raise if a trajectory has stalled; Serve then replaces the replica."""
        self._engine.check_health()

    async def describe(self) -> ModelCard:
        """Describe the model, its routers and the queue."""
        return await self._engine.describe()

    async def generate(self, request: EngineRequest) -> GeneratedImage | Exception:
        """Generate one image.

        An expected error is returned and not raised: Serve logs a page of stack for everything raised.
        """
        try:
            return await self._engine.generate(request)
        except REJECTIONS as error:
            return error.with_traceback(None)

    async def generate_stream(
        self, request: EngineRequest
    ) -> AsyncIterator[Progress | Preview | GeneratedImage | Exception]:
        """Yield the events of one image.

        An expected error is yielded and not raised, as `generate` returns it.
        """
        try:
            async for event in self._engine.generate_stream(request):
                yield event
        except REJECTIONS as error:
            yield error.with_traceback(None)


def _checked(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return result


class RemoteEngine:
    """This image source calls `GenerationDeployment` through its Serve handle.

    Serve does not retry the calls of a lost replica. Here they are: the image is the same on any replica.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def describe(self) -> ModelCard:
        """Describe the model, its routers and the queue of one replica."""
        card: ModelCard = await self._call_until_kept("describe")
        return card

    async def generate(self, request: EngineRequest) -> GeneratedImage:
        """Generate one image, on another replica if one is lost."""
        image: GeneratedImage = await self._call_until_kept("generate", request)
        return image

    async def generate_stream(
        self, request: EngineRequest
    ) -> AsyncIterator[Progress | Preview | GeneratedImage]:
        """Yield the events of one image, from another replica if one is lost."""
        last_step = 0  # another replica begins anew: events that the client has had are not sent again
        for pause_s in (*_PAUSES_S, None):
            try:
                async for event in self._stream(request):
                    if isinstance(event, GeneratedImage) or event.step > last_step:
                        yield event
                    last_step = last_step if isinstance(event, GeneratedImage) else max(last_step, event.step)
                return
            except _LOST:
                if pause_s is None:
                    raise
                await asyncio.sleep(pause_s)

    async def _call_until_kept(self, method: str, *args: Any) -> Any:
        """Call a method, and again on another replica while the one called is lost."""
        for pause_s in _PAUSES_S:
            try:
                return await self._call(method, *args)
            except _LOST:
                await asyncio.sleep(pause_s)
        return await self._call(method, *args)

    async def _call(self, method: str, *args: Any) -> Any:
        response = getattr(self._handle, method).remote(*args)
        try:
            return _checked(await response)
        except asyncio.CancelledError:
            response.cancel()  # the client has gone, or another image of its request was rejected
            raise
        except TaskCancelledError:
            raise asyncio.CancelledError from None  # Serve was faster: an error would be logged in full
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise Overloaded from error

    async def _stream(self, request: EngineRequest) -> AsyncIterator[Progress | Preview | GeneratedImage]:
        stream: Any = self._handle.options(stream=True).generate_stream.remote(request)
        try:
            async for event in stream:
                yield _checked(event)
        except TaskCancelledError:
            raise asyncio.CancelledError from None
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise Overloaded from error
        finally:
            stream.cancel()  # the client has gone; a finished stream is not changed by it


def api_builder(config: ServeConfig) -> Callable[[], FastAPI]:
    """Return a function that builds the `Api` deployment's app on its replica.

    The application's name and the node's keys are known only there.

    Raises:
        ValueError: the file of keys cannot be read, or has none.
    """
    is_closed = bool(load_keys(config.api_keys_file))

    def build_api() -> FastAPI:
        keys = load_keys(config.api_keys_file)
        if is_closed and not keys:
            raise ValueError(
                f"{ENVIRONMENT} is set where the application was built and not here: set it on every node, "
                "or give serve.api_keys_file"
            )
        source = RemoteEngine(serve.get_deployment_handle(GENERATION_DEPLOYMENT))
        return create_app(
            source,
            keys,
            cors_origins=config.cors_origins,
            assign_request_ids=False,
            lenient=config.lenient,
            read_timeout_s=config.read_timeout_s,
            max_upload_bytes=config.max_upload_bytes,
        )

    return build_api
