"""Define the two deployments of Ray Serve.

`GenerationDeployment` holds the model and generates; the function of `api_builder` makes the app that serves
HTTP, and calls the former.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve

from harmonica.models.loading import ModelConfig, load_model
from harmonica.validation.settings import require

from ..config.serve import ServeConfig
from .auth import ENVIRONMENT, load_keys
from .engine import GenerationEngine
from .image_sampler import ImageSampler
from .images_api import create_app
from .metrics import ServeMetrics
from .pipeline_folder import pipeline_folder
from .pipeline_sampler import PipelineSampler
from .planned_sampler import PlannedSampler
from .registry_watcher import RegistryWatcher
from .remote_engine import RemoteEngine
from .requests import (
    REJECTIONS,
    EngineRequest,
    GeneratedImage,
    ModelCard,
    Preview,
    Progress,
)
from .serve_args import ServeArgs

GENERATION_DEPLOYMENT = "Sampler"
"""Name of `GenerationDeployment` in Serve: a label of its metrics, and a key in files of `serve build`."""
_REGISTRY_WAIT_S = 600.0

logger = logging.getLogger("ray.serve")


def make_sampler(model: ModelConfig, config: ServeConfig) -> PlannedSampler[Any]:
    """Load what generates: a model with a branch file, or a diffusers pipeline.

    Raises:
        ValueError: the model cannot be loaded or cannot generate images, or settings that it does not follow.
    """
    device = "cuda" if config.use_gpu else "cpu"
    folder = pipeline_folder(model)
    if folder is None:
        loaded = load_model(model, device)
        return ImageSampler(loaded, device, over_limit=config.over_limit, max_steps=config.max_steps)
    require(
        config.over_limit == "truncate",
        "serve.over_limit",
        config.over_limit,
        "give truncate, since a diffusers pipeline reads as much of a prompt as it takes",
    )
    limits = {"max_steps": config.max_steps, "max_pixels": config.max_pixels}
    return PipelineSampler(folder, model, device, **limits)


class GenerationDeployment:
    """A replica holds the model in a generation engine, and follows the registry."""

    async def __init__(self, args: ServeArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        config = args.serve
        torch.set_num_threads(max(1, int(config.num_cpus)))
        images = make_sampler(args.model, config)
        self._engine = GenerationEngine(images, args.registered_model, config, ServeMetrics())
        watcher = RegistryWatcher(self._engine, args)
        await _first_poll(watcher)
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


async def _first_poll(watcher: RegistryWatcher) -> None:
    """Load the first router; while the registry does not answer, wait for it.

    A replica may be started, in the place of a lost one, while the registry is down.
    """
    deadline = time.monotonic() + _REGISTRY_WAIT_S
    while True:
        try:
            await watcher.poll()
            return
        except ValueError:
            raise
        except Exception as error:
            if time.monotonic() > deadline:
                raise
            logger.warning("the registry does not answer yet: %s", error)
            await asyncio.sleep(2)


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
