"""What runs in Ray Serve's replicas: `Sampler` holds the model and draws, `api_builder` speaks HTTP."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from harmonica.models.loading import load_model
from pipelines.config.serve import ServeConfig
from pipelines.serving.auth import ENVIRONMENT, load_keys
from pipelines.serving.batching import Overloaded
from pipelines.serving.engine import Studio
from pipelines.serving.image_sampler import ImageSampler
from pipelines.serving.images_api import create_app
from pipelines.serving.metrics import ServeMetrics
from pipelines.serving.registry_watcher import Follower, ServeArgs
from pipelines.serving.requests import REFUSALS, Drawing, ModelCard, Order, Preview, Progress

_REGISTRY_WAIT_S = 600.0
_LOST = (ActorDiedError, ActorUnavailableError)
_PAUSES_S = (0.0, 0.2, 0.5, 1.0, 2.0)
"""Before an order goes to another replica; of a lost node, several calls may fail before Serve knows."""


logger = logging.getLogger("ray.serve")


class Sampler:
    """A studio whose routers follow the registry."""

    async def __init__(self, args: ServeArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        config = args.serve
        torch.set_num_threads(max(1, int(config.num_cpus)))
        device = "cuda" if config.use_gpu else "cpu"
        images = ImageSampler(
            load_model(args.model, device), device, over_limit=config.over_limit, max_steps=config.max_steps
        )
        self._studio = Studio(images, args.registered_model, config, ServeMetrics())
        follower = Follower(self._studio, args)
        await _first_look(follower)
        await self._studio.settle()
        self._following = asyncio.create_task(follower.follow()) if args.tracking_uri else None

    def check_health(self) -> None:
        """Serve replaces a replica where this raises."""
        self._studio.check_health()

    async def describe(self) -> ModelCard:
        return await self._studio.describe()

    async def draw(self, order: Order) -> Drawing | Exception:
        """What is refused is returned: of what is raised Serve logs the stack, a page for every refusal."""
        try:
            return await self._studio.draw(order)
        except REFUSALS as error:
            return error.with_traceback(None)

    async def watch(self, order: Order) -> AsyncIterator[Progress | Preview | Drawing | Exception]:
        try:
            async for event in self._studio.watch(order):
                yield event
        except REFUSALS as error:
            yield error.with_traceback(None)


async def _first_look(follower: Follower) -> None:
    """A replica that takes a lost one's place while the registry is away waits for it."""
    deadline = time.monotonic() + _REGISTRY_WAIT_S
    while True:
        try:
            await follower.look()
            return
        except ValueError:
            raise
        except Exception as error:
            if time.monotonic() > deadline:
                raise
            logger.warning("the registry does not answer yet: %s", error)
            await asyncio.sleep(2)


def _checked(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return result


class RemoteSampler:
    """`ImageSource` over the Sampler deployment's handle.

    Serve does not retry what a lost replica was doing. The order's image is the same anywhere.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def describe(self) -> ModelCard:
        return await self._call("describe")

    async def draw(self, order: Order) -> Drawing:
        for pause_s in _PAUSES_S:
            try:
                return await self._call("draw", order)
            except _LOST:
                await asyncio.sleep(pause_s)
        return await self._call("draw", order)

    async def watch(self, order: Order) -> AsyncIterator[Progress | Preview | Drawing]:
        told = 0
        for pause_s in (*_PAUSES_S, None):
            try:
                async for event in self._watch(order):
                    if isinstance(event, Drawing) or event.step > told:
                        yield event
                    told = told if isinstance(event, Drawing) else max(told, event.step)
                return
            except _LOST:
                if pause_s is None:
                    raise
                await asyncio.sleep(pause_s)

    async def _call(self, method: str, *args: Any) -> Any:
        response = getattr(self._handle, method).remote(*args)
        try:
            return _checked(await response)
        except asyncio.CancelledError:
            response.cancel()  # the client has gone, or another image of its request was refused
            raise
        except TaskCancelledError:
            raise asyncio.CancelledError from None  # Serve was faster: an error would be logged in full
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise Overloaded from error

    async def _watch(self, order: Order) -> AsyncIterator[Progress | Preview | Drawing]:
        stream: Any = self._handle.options(stream=True).watch.remote(order)
        try:
            async for event in stream:
                yield _checked(event)
        except TaskCancelledError:
            raise asyncio.CancelledError from None
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise Overloaded from error
        finally:
            stream.cancel()  # a client that has gone; of a finished stream nothing


def api_builder(config: ServeConfig) -> Callable[[], FastAPI]:
    """What makes the `Api` deployment's app on its replica, where the application's name and keys are known.

    Raises:
        ValueError: no keys in the file that should have them.
    """
    is_closed = bool(load_keys(config.api_keys_file))

    def build_api() -> FastAPI:
        keys = load_keys(config.api_keys_file)
        if is_closed and not keys:
            raise ValueError(
                f"{ENVIRONMENT} is set where the application was built and not here: set it on every node, "
                "or give serve.api_keys_file"
            )
        source = RemoteSampler(serve.get_deployment_handle("Sampler"))
        return create_app(
            source,
            keys,
            cors_origins=config.cors_origins,
            names_requests=False,
            lenient=config.lenient,
            read_timeout_s=config.read_timeout_s,
        )

    return build_api
