"""Wait until the models are described, when a replica of `Api` starts.

It waits only as long as the application is wanted.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

Described = TypeVar("Described")
_PERIOD_S = 1.0


async def describe_while_wanted(
    describe: Callable[[], Awaitable[Described]],
    is_wanted: Callable[[], bool],
    period_s: float = _PERIOD_S,
) -> Described:
    """Return the description, however long the models take to load.

    If they cannot be loaded it never comes, and Serve, which stops no replica before its start is over, would
    wait for this one for as long as it waits for requests.

    Args:
        describe: asks for the description.
        is_wanted: whether the application is still to be served; called in a thread.
        period_s: how often that is asked.

    Raises:
        RuntimeError: the application is being deleted.
    """
    asked = asyncio.ensure_future(describe())
    try:
        while not asked.done():
            await asyncio.wait((asked,), timeout=period_s)
            if not asked.done() and not await asyncio.to_thread(is_wanted):
                raise RuntimeError("the application is being deleted, and its models were not loaded before")
        return asked.result()
    finally:
        asked.cancel()
