"""Answer the streams of several images as one stream of server-sent events."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import BaseModel

from .http_errors import as_api_error

Item = TypeVar("Item")
logger = logging.getLogger("ray.serve")


async def merge(streams: Sequence[AsyncIterator[Item]]) -> AsyncIterator[tuple[int, Item]]:
    """Yield the items of all streams as they come, each with its stream's number.

    Closing this closes all streams.
    """
    ready: asyncio.Queue[tuple[int, Item] | BaseException | None] = asyncio.Queue()

    async def pump(number: int, stream: AsyncIterator[Item]) -> None:
        try:
            async for item in stream:
                ready.put_nowait((number, item))
        except BaseException as error:  # CancelledError too, or it would be waited for
            ready.put_nowait(error)
        else:
            ready.put_nowait(None)

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    left = len(tasks)
    try:
        while left:
            event = await ready.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                left -= 1
            else:
                yield event
    finally:
        for task in tasks:
            task.cancel()


def _encode(event: BaseModel) -> bytes:
    return format_sse_event(event=event.type, data_str=event.model_dump_json())  # type: ignore[attr-defined]


async def _encoded(first: BaseModel, rest: AsyncIterator[BaseModel]) -> AsyncIterator[bytes]:
    yield _encode(first)
    try:
        async for event in rest:
            yield _encode(event)
    except Exception as error:  # the status has been sent: OpenAI's client looks for `error` in the data
        api_error = as_api_error(error)
        if api_error.status == 500:
            logger.error("generating failed", exc_info=error)
        yield format_sse_event(event="error", data_str=api_error.body().model_dump_json())


async def stream_events(events: AsyncIterator[BaseModel]) -> EventSourceResponse:
    """Wait for the first event, and return the answer that streams all of them.

    An error before the first event is thus answered by a status.

    Args:
        events: models with a `type`, which names the event.
    """
    first = await anext(events)
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}  # no proxy holds events back
    return EventSourceResponse(_encoded(first, events), headers=headers)
