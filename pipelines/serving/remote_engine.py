"""Call the deployment that generates, from the one that serves HTTP."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from .batching import Overloaded
from .requests import Catalog, EngineRequest, GeneratedImage, Preview, Progress

_LOST = (ActorDiedError, ActorUnavailableError)
_PAUSES_S = (0.0, 0.2, 0.5, 1.0, 2.0)
"""Pauses before a request is sent to another replica: after a node is lost, several calls may fail before
Serve notices."""


def _checked(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return result


class RemoteEngine:
    """This image source calls `GenerationDeployment` through its Serve handle.

    Serve does not retry the calls of a lost replica. Here they are: the image is the same on any replica.
    """

    def __init__(self, handle: DeploymentHandle[Any], *, is_multiplexed: bool = False) -> None:
        """Take a handle.

        Args:
            is_multiplexed: whether the replicas have several models. Serve then prefers a replica that has
                loaded the model of a request.
        """
        self._handle, self._is_multiplexed = handle, is_multiplexed

    def _to(self, model: str) -> DeploymentHandle[Any]:
        """Return a handle whose calls go to a replica with this model if there is one."""
        if self._is_multiplexed and model:
            return self._handle.options(multiplexed_model_id=model)
        return self._handle

    async def describe(self, model: str = "") -> Catalog:
        """Describe the models, their routers and the queues of one replica."""
        catalog: Catalog = await self._call_until_kept(self._to(model).describe, model)
        return catalog

    async def generate(self, request: EngineRequest) -> GeneratedImage:
        """Generate one image, on another replica if one is lost."""
        image: GeneratedImage = await self._call_until_kept(self._to(request.model).generate, request)
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

    async def _call_until_kept(self, method: DeploymentHandle[Any], *args: Any) -> Any:
        """Call a method, and again on another replica while the one called is lost."""
        for pause_s in _PAUSES_S:
            try:
                return await self._call(method, *args)
            except _LOST:
                await asyncio.sleep(pause_s)
        return await self._call(method, *args)

    async def _call(self, method: DeploymentHandle[Any], *args: Any) -> Any:
        response: Any = method.remote(*args)
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
        handle = self._to(request.model).options(stream=True)
        stream: Any = handle.generate_stream.remote(request)
        try:
            async for event in stream:
                yield _checked(event)
        except TaskCancelledError:
            raise asyncio.CancelledError from None
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise Overloaded from error
        finally:
            stream.cancel()  # the client has gone; a finished stream is not changed by it
