"""Work that is cheaper in company: items of one key are done together, one batch at a time.

Ray Serve's `@serve.batch` closes a batch that waits for company as soon as its time is over, even while
the batch before still runs. Here a batch is closed when its turn comes: the busier, the fuller. It waits
for nobody but who is expected: the rest of a request, and those who have just been answered and will ask
again, since of two halves that take turns each would wait for the other's batch as well as its own.
"""

import asyncio
import math
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from pipelines.serving.latency_model import Pace

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")
Other = TypeVar("Other")
_WAIT_SHARE = 0.25
"""Of the last batch's time: what those who ask again are waited for at most."""
_KEPT_PACES = 32


class Overloaded(Exception):
    """No more can wait now."""

    def __init__(self, retry_after_s: int = 1) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s
        """When there should be room again."""


class TimedOut(Exception):
    """It waited for as long as it was willing to."""


@dataclass(eq=False, slots=True)
class _Place(Generic[Key, Item, Result]):
    """Who waits in the queue."""

    key: Key
    item: Item
    arrived: float
    company: int
    result: asyncio.Future[Result]


class Batcher(Generic[Key, Item, Result]):
    """A queue in front of a thread. Of the longest waiting item's key it takes as many as fit.

    Args:
        work: done in the thread with a key and its items; gives a result an item, in order.
        max_batch_size: items at once.
        wait_s: how long an item waits at most for company that is expected.
        max_waiting: items in the queue, beside those being worked on.
        target_s: what an item may take that finds a batch running; batches are kept as small as that wants.
    """

    def __init__(
        self,
        work: Callable[[Key, list[Item]], list[Result]],
        *,
        max_batch_size: int,
        wait_s: float,
        max_waiting: int,
        target_s: float | None = None,
    ) -> None:
        self._work, self.max_batch_size = work, max_batch_size
        self._wait_s, self._max_waiting, self._target_s = wait_s, max_waiting, target_s
        self._waiting: list[_Place[Key, Item, Result]] = []
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trajectory")
        self._runner: asyncio.Task[None] | None = None
        self._last_s, self._is_busy = 0.0, False
        self._freed_at = 0.0
        self._expected: dict[Key, int] = {}
        self._paces: dict[Key, Pace] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_busy(self) -> bool:
        """Whether a batch is being worked on."""
        return self._is_busy

    def check_room(self) -> None:
        """Say early what `submit` would say.

        Raises:
            Overloaded: as many wait as may.
        """
        if len(self._waiting) >= self._max_waiting:
            batches = math.ceil((len(self._waiting) + 1) / self.max_batch_size)
            raise Overloaded(max(1, math.ceil(batches * self._last_s)))

    async def submit(
        self, key: Key, item: Item, *, company: int = 1, timeout_s: float | None = None
    ) -> Result:
        """The item's result. Cancelled before its batch starts, it gives up its place.

        Args:
            company: items that come together, this one among them.
            timeout_s: how long it waits for its batch to start.

        Raises:
            Overloaded: as many wait as may.
            TimedOut: its time is over, and its place given up.
        """
        self.check_room()
        loop = asyncio.get_running_loop()
        place = _Place[Key, Item, Result](key, item, loop.time(), company, loop.create_future())
        self._waiting.append(place)
        self._arrival.set()
        if self._runner is None or self._runner.done():
            self._runner = loop.create_task(self._run())
        try:
            await asyncio.wait((place.result,), timeout=timeout_s)
            if place in self._waiting:
                raise TimedOut
            return await place.result
        finally:
            place.result.cancel()
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
            most = self._most(oldest.key)
            batch = [place for place in self._waiting if place.key == oldest.key][:most]
            left = 0.0 if len(batch) == most else self._waits_until(oldest, len(batch)) - loop.time()
            if left <= 0:
                self._waiting = [place for place in self._waiting if place not in batch]
                return batch
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), left)
            except TimeoutError:
                continue
        return []

    def _most(self, key: Key) -> int:
        """Items of a batch. One that finds another running may have to wait for that, and for company."""
        if self._target_s is None or key not in self._paces:
            return self.max_batch_size
        return self._paces[key].largest((self._target_s - self._wait_s) / 2, self.max_batch_size)

    def _waits_until(self, oldest: _Place[Key, Item, Result], found: int) -> float:
        """When a batch of so many is closed, on the loop's clock."""
        until = 0.0
        if found < oldest.company:
            until = oldest.arrived + self._wait_s
        if found < self._expected.get(oldest.key, 0):
            until = max(until, self._freed_at + min(self._wait_s, _WAIT_SHARE * self._last_s))
        return until

    async def _do(self, batch: list[_Place[Key, Item, Result]]) -> None:
        loop, key = asyncio.get_running_loop(), batch[0].key
        started = loop.time()
        try:
            items = [place.item for place in batch]
            self._is_busy = True
            results = await loop.run_in_executor(self._thread, self._work, key, items)
        except Exception as error:
            for place in batch:
                if not place.result.done():
                    place.result.set_exception(error)
            return
        finally:
            self._is_busy = False
        self._learn(key, len(batch), started, loop.time())
        for place, result in zip(batch, results, strict=True):
            if not place.result.done():  # its client may have gone meanwhile
                place.result.set_result(result)

    def _learn(self, key: Key, size: int, started: float, ended: float) -> None:
        """What the next batches go by."""
        self._freed_at, self._last_s = ended, ended - started
        self._expected = {key: size + sum(place.key == key for place in self._waiting)}
        if key not in self._paces and len(self._paces) == _KEPT_PACES:
            del self._paces[next(iter(self._paces))]
        self._paces.setdefault(key, Pace()).add(size, self._last_s)
