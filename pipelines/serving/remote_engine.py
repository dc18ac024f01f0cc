"""Call the deployment that generates, from the one that serves HTTP."""

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from .batching import Overloaded
from .call_deadlines import Deadline
from .requests import Catalog, EngineRequest, GeneratedImage, Preview, Progress

_LOST = (ActorDiedError, ActorUnavailableError)
_PAUSES_S = (0.0, 0.2, 0.5, 1.0, 2.0)
"""Pauses before a request is sent to another replica: after a node is lost, several calls may fail before
Serve notices."""


def _checked(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return result


def _with_time_left(argument: EngineRequest | str, deadline: Deadline) -> EngineRequest | str:
    """Return a request with the time it may still wait, and anything else as it is.

    Raises:
        TimedOut: it may not wait any more.
    """
    left_s = deadline.left_s
    return replace(argument, timeout_s=left_s) if isinstance(argument, EngineRequest) else argument


class RemoteEngine:
    """This image source calls `GenerationDeployment` through its Serve handle.

    Serve does not retry the calls of a lost replica. Here they are: the image is the same on any replica.
    """

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        *,
        is_multiplexed: bool = False,
        timeout_s: float = math.inf,
        work_s: float = 0.0,
    ) -> None:
        """Take a handle.

        Args:
            is_multiplexed: whether the replicas have several models. Serve then prefers a replica that has
                loaded the model of a request.
            timeout_s: how long an image may wait for its trajectory, where its request does not ask for less.
            work_s: how long a trajectory may take, with its answer.
        """
        self._handle, self._is_multiplexed = handle, is_multiplexed
        self._timeout_s, self._work_s = timeout_s, work_s
        self._answered_in_s = 0.0

    def _deadline(self, timeout_s: float | None = None) -> Deadline:
        bound_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        return Deadline(bound_s, self._work_s) if math.isfinite(bound_s) else Deadline()

    def _answered_since(self, started: float) -> None:
        """Remember how long an image took, its wait in the queue included."""
        self._answered_in_s = asyncio.get_running_loop().time() - started

    def _overloaded(self) -> Overloaded:
        """Return the error of a request that Serve refused to queue.

        An image that was just answered waited for as many others as this one would have.
        """
        return Overloaded(max(1, math.ceil(self._answered_in_s)))

    def _to(self, model: str) -> DeploymentHandle[Any]:
        """Return a handle whose calls go to a replica with this model if there is one."""
        if self._is_multiplexed and model:
            return self._handle.options(multiplexed_model_id=model)
        return self._handle

    async def describe(self, model: str = "") -> Catalog:
        """Describe the models, their routers and the queues of one replica.

        Without a model it waits until there is a replica, however long that takes to load.
        """
        deadline = self._deadline() if model else Deadline()
        catalog: Catalog = await self._call_until_kept(deadline, self._to(model).describe, model)
        return catalog

    async def generate(self, request: EngineRequest) -> GeneratedImage:
        """Generate one image, on another replica if one is lost."""
        deadline, started = self._deadline(request.timeout_s), asyncio.get_running_loop().time()
        image: GeneratedImage = await self._call_until_kept(
            deadline, self._to(request.model).generate, request
        )
        self._answered_since(started)
        return image

    async def generate_stream(
        self, request: EngineRequest
    ) -> AsyncIterator[Progress | Preview | GeneratedImage]:
        """Yield the events of one image, from another replica if one is lost."""
        deadline, started = self._deadline(request.timeout_s), asyncio.get_running_loop().time()
        last_step = 0  # another replica begins anew: events that the client has had are not sent again
        for pause_s in (*_PAUSES_S, None):
            try:
                async for event in self._stream(deadline, request):
                    if isinstance(event, GeneratedImage) or event.step > last_step:
                        yield event
                    last_step = last_step if isinstance(event, GeneratedImage) else max(last_step, event.step)
                self._answered_since(started)
                return
            except _LOST:
                if pause_s is None:
                    raise
                await asyncio.sleep(pause_s)

    async def _call_until_kept(
        self, deadline: Deadline, method: DeploymentHandle[Any], argument: EngineRequest | str
    ) -> Any:
        """Call a method, and again on another replica while the one called is lost."""
        for pause_s in _PAUSES_S:
            try:
                return await self._call(deadline, method, argument)
            except _LOST:
                await asyncio.sleep(pause_s)
        return await self._call(deadline, method, argument)

    async def _call(
        self, deadline: Deadline, method: DeploymentHandle[Any], argument: EngineRequest | str
    ) -> Any:
        response: Any = method.remote(_with_time_left(argument, deadline))
        try:
            await deadline.accepted(response)
            return _checked(await deadline.answered(response, response))
        except asyncio.CancelledError:
            response.cancel()  # the client has gone, or another image of its request was rejected
            raise
        except TaskCancelledError:
            raise asyncio.CancelledError from None  # Serve was faster: an error would be logged in full
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise self._overloaded() from error

    async def _stream(
        self, deadline: Deadline, request: EngineRequest
    ) -> AsyncIterator[Progress | Preview | GeneratedImage]:
        handle = self._to(request.model).options(stream=True)
        stream: Any = handle.generate_stream.remote(_with_time_left(request, deadline))
        events = aiter(stream)
        try:
            await deadline.accepted(stream)
            while True:
                try:
                    event = await deadline.answered(stream, anext(events))
                except StopAsyncIteration:
                    return
                yield _checked(event)
        except TaskCancelledError:
            raise asyncio.CancelledError from None
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise self._overloaded() from error
        finally:
            stream.cancel()  # the client has gone; a finished stream is not changed by it
