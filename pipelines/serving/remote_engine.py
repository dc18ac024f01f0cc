"""Call the deployment that generates, from the one that serves HTTP."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from .batching import Overloaded
from .requests import EngineRequest, GeneratedImage, ModelCard, Preview, Progress

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
