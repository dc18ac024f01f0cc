"""Work that is cheaper in company: items of one key are done together, one batch at a time.

Ray Serve's `@serve.batch` closes a batch that waits for company as soon as its time is over, even while
the batch before still runs. Here a batch is closed when its turn comes: the busier, the fuller.
"""

import asyncio
import math
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")
Other = TypeVar("Other")


class Overloaded(Exception):
    """No more can wait now."""

    def __init__(self, retry_after_s: int = 1) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s
        """When there should be room again."""


@dataclass(eq=False, slots=True)
class _Place(Generic[Key, Item, Result]):
    """Who waits in the queue."""

    key: Key
    item: Item
    arrived: float
    result: asyncio.Future[Result]


class Batcher(Generic[Key, Item, Result]):
    """A queue in front of a thread. Of the longest waiting item's key it takes as many as fit.

    Args:
        work: done in the thread with a key and its items; gives a result an item, in order.
        max_batch_size: items at once.
        wait_s: how long an item waits for company where nothing keeps it waiting anyway.
        max_waiting: items in the queue, beside those being worked on.
    """

    def __init__(
        self,
        work: Callable[[Key, list[Item]], list[Result]],
        *,
        max_batch_size: int,
        wait_s: float,
        max_waiting: int,
    ) -> None:
        self._work, self._max_batch_size = work, max_batch_size
        self._wait_s, self._max_waiting = wait_s, max_waiting
        self._waiting: list[_Place[Key, Item, Result]] = []
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trajectory")
        self._runner: asyncio.Task[None] | None = None
        self._last_s = 0.0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def check_room(self) -> None:
        """Say early what `submit` would say.

        Raises:
            Overloaded: as many wait as may.
        """
        if len(self._waiting) >= self._max_waiting:
            batches = math.ceil((len(self._waiting) + 1) / self._max_batch_size)
            raise Overloaded(max(1, math.ceil(batches * self._last_s)))

    async def submit(self, key: Key, item: Item) -> Result:
        """The item's result. Cancelled before its batch starts, it gives up its place.

        Raises:
            Overloaded: as many wait as may.
        """
        self.check_room()
        loop = asyncio.get_running_loop()
        place = _Place[Key, Item, Result](key, item, loop.time(), loop.create_future())
        self._waiting.append(place)
        self._arrival.set()
        if self._runner is None or self._runner.done():
            self._runner = loop.create_task(self._run())
        try:
            return await place.result
        finally:
            if place in self._waiting:
                self._waiting.remove(place)

    async def in_thread(self, function: Callable[[], Other]) -> Other:
        """Between two batches, in their thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _run(self) -> None:
        """Until nobody waits."""
        while self._waiting:
            batch = await self._close_batch()
            if batch:
                await self._do(batch)

    async def _close_batch(self) -> list[_Place[Key, Item, Result]]:
        """Taken off the queue; empty where all who waited have gone."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            oldest = self._waiting[0]
            batch = [place for place in self._waiting if place.key == oldest.key][: self._max_batch_size]
            left = oldest.arrived + self._wait_s - loop.time()
            if left <= 0 or len(batch) == self._max_batch_size:
                self._waiting = [place for place in self._waiting if place not in batch]
                return batch
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), left)
            except TimeoutError:
                continue
        return []

    async def _do(self, batch: list[_Place[Key, Item, Result]]) -> None:
        loop, key = asyncio.get_running_loop(), batch[0].key
        started = loop.time()
        try:
            items = [place.item for place in batch]
            results = await loop.run_in_executor(self._thread, self._work, key, items)
        except Exception as error:
            for place in batch:
                if not place.result.done():
                    place.result.set_exception(error)
            return
        self._last_s = loop.time() - started
        for place, result in zip(batch, results, strict=True):
            if not place.result.done():  # its client may have gone meanwhile
                place.result.set_result(result)
