"""Define the two deployments of Ray Serve.

`GenerationDeployment` holds the model and generates; the function of `api_builder` makes the app that serves
HTTP, and calls the former.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import torch
from fastapi import FastAPI
from ray import serve

from ..config.serve import ServeConfig
from .auth import ENVIRONMENT, load_keys
from .batching import Worker
from .engine import GenerationEngine
from .engine_loader import EngineLoader
from .images_api import create_app
from .loaded_engine import LoadedEngine
from .metrics import ServeMetrics
from .multiplexed_engines import MultiplexedEngines, keep_loaded
from .remote_engine import RemoteEngine
from .requests import (
    REJECTIONS,
    Catalog,
    EngineRequest,
    GeneratedImage,
    Preview,
    Progress,
)
from .serve_args import ServeArgs

GENERATION_DEPLOYMENT = "Sampler"
"""Name of `GenerationDeployment` in Serve: a label of its metrics, and a key in files of `serve build`."""


class GenerationDeployment:
    """A replica holds the models in generation engines, and follows the registry."""

    async def __init__(self, args: ServeArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        config = self._config = args.serve
        torch.set_num_threads(max(1, int(config.num_cpus)))
        by_name = args.by_name()
        # Batches of several models take turns: two trajectories at once would slow down each other.
        worker = Worker()
        loaders = {
            name: EngineLoader(each, name, ServeMetrics(name if args.models else ""), worker)
            for name, each in by_name.items()
        }

        async def load(name: str) -> LoadedEngine:
            return await loaders[name].load()

        if args.models:
            most = config.max_models_per_replica or len(by_name)
            loading = serve.multiplexed(max_num_models_per_replica=most)(load)
        else:
            loading = keep_loaded(load)
        at_most = config.max_waiting + config.max_batch_size
        self._engines = MultiplexedEngines(tuple(by_name), loading, max_waiting=at_most)
        await self._engines.load_all()

    def check_health(self) -> None:
        """Raise if a trajectory has stalled; Serve then replaces the replica."""
        self._engines.check_health()

    async def describe(self, model: str = "") -> Catalog | Exception:
        """Describe the models, their routers and queues.

        Args:
            model: one to load first. Default: none is loaded.
        """
        try:
            if model:
                async with self._engines.using(model, self._config.timeout_s):
                    pass
            return await self._engines.describe()
        except REJECTIONS as error:
            return error.with_traceback(None)

    async def generate(self, request: EngineRequest) -> GeneratedImage | Exception:
        """Generate one image.

        An expected error is returned and not raised: Serve logs a page of stack for everything raised.
        """
        try:
            async with self._using(request) as (engine, request):
                return await engine.generate(request)
        except REJECTIONS as error:
            return error.with_traceback(None)

    async def generate_stream(
        self, request: EngineRequest
    ) -> AsyncIterator[Progress | Preview | GeneratedImage | Exception]:
        """Yield the events of one image.

        An expected error is yielded and not raised, as `generate` returns it.
        """
        try:
            async with self._using(request) as (engine, request):
                async for event in engine.generate_stream(request):
                    yield event
        except REJECTIONS as error:
            yield error.with_traceback(None)

    @asynccontextmanager
    async def _using(self, request: EngineRequest) -> AsyncIterator[tuple[GenerationEngine, EngineRequest]]:
        """Yield the engine of a request, and the request with the time it has left."""
        bound, began = self._config.timeout_s, time.monotonic()
        timeout_s = bound if request.timeout_s is None else min(bound, request.timeout_s)
        async with self._engines.using(request.model, timeout_s) as engine:
            yield engine, replace(request, timeout_s=max(0.0, timeout_s - (time.monotonic() - began)))


def api_builder(config: ServeConfig, *, is_multiplexed: bool = False) -> Callable[[], FastAPI]:
    """Return a function that builds the `Api` deployment's app on its replica.

    The application's name and the node's keys are known only there.

    Args:
        is_multiplexed: whether the replicas that generate have several models.

    Raises:
        ValueError: the file of keys cannot be read, or has none.
    """
    is_closed = bool(load_keys(config.api_keys_file))

    def is_wanted(application: str) -> bool:
        found = serve.status().applications.get(application)
        return found is not None and found.status != "DELETING"

    def build_api() -> FastAPI:
        keys = load_keys(config.api_keys_file)
        if is_closed and not keys:
            raise ValueError(
                f"{ENVIRONMENT} is set where the application was built and not here: set it on every node, "
                "or give serve.api_keys_file"
            )
        source = RemoteEngine(
            serve.get_deployment_handle(GENERATION_DEPLOYMENT),
            is_multiplexed=is_multiplexed,
            timeout_s=config.timeout_s,
            work_s=config.stall_timeout_s,
        )
        return create_app(
            source,
            keys,
            is_wanted=partial(is_wanted, serve.get_replica_context().app_name),
            cors_origins=config.cors_origins,
            assign_request_ids=False,
            lenient=config.lenient,
            read_timeout_s=config.read_timeout_s,
            max_upload_bytes=config.max_upload_bytes,
        )

    return build_api
