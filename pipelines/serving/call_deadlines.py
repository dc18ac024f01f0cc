"""Bound how long a request's calls may take, whatever becomes of a replica."""

import asyncio
from collections.abc import Awaitable
from typing import Any, Protocol, TypeVar

from .batching import TimedOut

Answered = TypeVar("Answered")


class Response(Protocol):
    """A response is what a call through a Serve handle returns at once.

    A stream is one too.
    """

    def cancel(self) -> None:
        """Cancel the call."""
        ...

    async def _fetch_future_result_async(self) -> Any:
        """Return once a replica has taken the call. Serve has no other name for this."""
        ...


class Deadline:
    """A deadline is kept through all the calls that are made for one request.

    The replicas keep time too, but one that hangs does not.

    Args:
        wait_s: how long the request may wait until its trajectory starts. Default: for ever.
        work_s: how long a trajectory may take, with its answer; one that has started is not cut off.
    """

    def __init__(self, wait_s: float | None = None, work_s: float = 0.0) -> None:
        now = asyncio.get_running_loop().time()
        self._start = None if wait_s is None else now + wait_s
        self._end = None if wait_s is None else now + wait_s + work_s

    @property
    def left_s(self) -> float | None:
        """Return how long the request may still wait, or None if that is for ever.

        Raises:
            TimedOut: it may not wait any more.
        """
        if self._start is None:
            return None
        left_s = self._start - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise TimedOut
        return left_s

    async def accepted(self, response: Response) -> None:
        """Return once a replica has taken a call.

        Raises:
            TimedOut: none has in time; the call is cancelled.
        """
        await self._bounded(self._start, response, response._fetch_future_result_async())

    async def answered(self, response: Response, answer: Awaitable[Answered]) -> Answered:
        """Return the answer, or an event of it, of a call that a replica has taken.

        Raises:
            TimedOut: its trajectory would have ended by now; the call is cancelled.
        """
        return await self._bounded(self._end, response, answer)

    async def _bounded(
        self, until: float | None, response: Response, awaited: Awaitable[Answered]
    ) -> Answered:
        timeout = asyncio.timeout_at(until)
        try:
            async with timeout:
                return await awaited
        except TimeoutError:
            if not timeout.expired():
                raise
            response.cancel()
            raise TimedOut from None
