"""Batch items dynamically: those with equal keys are worked on together.

One batch runs at a time. A batch is closed when the worker becomes free, not after a fixed delay: Ray
Serve's `@serve.batch` closes one when its delay is over, even while the batch before still runs. Batches
therefore grow with the load. The batcher waits, briefly, only for items that it expects: the remaining images
of a request, and the next requests of closed-loop clients that were just answered. Without the latter wait
such clients split into two groups that alternate, and each waits for two batches.
"""

import asyncio
import math
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from .latency_model import LatencyModel

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")
Other = TypeVar("Other")
_MAX_WAIT_FRACTION = 0.25
"""Upper bound of the wait for clients that were just answered, as a fraction of the last batch's time."""
_MAX_LATENCY_MODELS = 32


class Overloaded(Exception):
    """The queue is full."""

    def __init__(self, retry_after_s: int = 1) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s
        """Seconds after which there should be room again."""


class TimedOut(Exception):
    """The item has waited for its batch for longer than its timeout."""


@dataclass(eq=False, slots=True)
class _QueuedItem(Generic[Key, Item, Result]):
    """An item in the queue, with the future that its submitter awaits."""

    key: Key
    item: Item
    arrived: float
    group_size: int
    result: asyncio.Future[Result]


class Worker:
    """A worker is a thread that runs one batch at a time.

    Batchers that share it take turns.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="trajectory")
        self.turn = asyncio.Lock()
        """Held from the closing of a batch until it is done; those who wait get it in the order they came."""


class Batcher(Generic[Key, Item, Result]):
    """A queue in front of one worker thread.

    The next batch has the key of the item that has waited longest, and as many items of that key as fit.

    Args:
        work: function that the thread calls with a key and its items; returns one result for each item, in
            the same order.
        max_batch_size: largest number of items in a batch.
        wait_s: longest time that an item waits for other items that are expected.
        max_waiting: largest number of items in the queue, those being worked on not counted.
        target_s: latency that batches are kept small enough for, of an item that finds a batch running.
            Default: no target.
        worker: what runs the batches. Default: one of its own.
    """

    def __init__(
        self,
        work: Callable[[Key, list[Item]], list[Result]],
        *,
        max_batch_size: int,
        wait_s: float,
        max_waiting: int,
        target_s: float | None = None,
        worker: Worker | None = None,
    ) -> None:
        self._work, self.max_batch_size = work, max_batch_size
        self._wait_s, self._max_waiting, self._target_s = wait_s, max_waiting, target_s
        self._waiting: list[_QueuedItem[Key, Item, Result]] = []
        self._arrival = asyncio.Event()
        self._worker = worker or Worker()
        self._runner: asyncio.Task[None] | None = None
        self._last_s, self._is_busy = 0.0, False
        self._freed_at = 0.0
        self._expected: dict[Key, int] = {}
        self._latency_models: dict[Key, LatencyModel] = {}

    @property
    def num_waiting(self) -> int:
        """Return the number of items in the queue, those being worked on not counted."""
        return len(self._waiting)

    @property
    def is_busy(self) -> bool:
        """Return whether a batch is being worked on."""
        return self._is_busy

    def check_room(self) -> None:
        """Check that the queue has room, as `submit` does.

        Raises:
            Overloaded: the queue is full.
        """
        if len(self._waiting) >= self._max_waiting:
            batches = math.ceil((len(self._waiting) + 1) / self.max_batch_size)
            raise Overloaded(max(1, math.ceil(batches * self._last_s)))

    async def submit(
        self, key: Key, item: Item, *, group_size: int = 1, timeout_s: float | None = None
    ) -> Result:
        """Queue an item, and return its result.

        An item whose submitter is cancelled before its batch starts leaves the queue.

        Args:
            group_size: number of items that are submitted together, this one included.
            timeout_s: how long it waits for its batch to start. Default: for ever.

        Raises:
            Overloaded: the queue is full.
            TimedOut: its batch has not started within `timeout_s`; it has left the queue.
        """
        self.check_room()
        loop = asyncio.get_running_loop()
        queued = _QueuedItem[Key, Item, Result](key, item, loop.time(), group_size, loop.create_future())
        self._waiting.append(queued)
        self._arrival.set()
        if self._runner is None or self._runner.done():
            self._runner = loop.create_task(self._run())
        try:
            await asyncio.wait((queued.result,), timeout=timeout_s)
            if queued in self._waiting:
                raise TimedOut
            return await queued.result
        finally:
            queued.result.cancel()
            if queued in self._waiting:
                self._waiting.remove(queued)

    async def run_between_batches(self, function: Callable[[], Other]) -> Other:
        """Run a function in the worker thread when no batch is running there."""
        return await asyncio.get_running_loop().run_in_executor(self._worker.thread, function)

    async def _run(self) -> None:
        """Work off the queue until it is empty."""
        while self._waiting:
            async with self._worker.turn:  # closed when the worker is free, whosever batch it had
                batch = await self._close_batch()
                if batch:
                    await self._run_batch(batch)

    async def _close_batch(self) -> list[_QueuedItem[Key, Item, Result]]:
        """Take the next batch off the queue.

        It is empty if every item has left the queue meanwhile.
        """
        loop = asyncio.get_running_loop()
        while self._waiting:
            oldest = self._waiting[0]
            limit = self._batch_limit(oldest.key)
            batch = [queued for queued in self._waiting if queued.key == oldest.key][:limit]
            left = 0.0 if len(batch) == limit else self._closing_time(oldest, len(batch)) - loop.time()
            if left <= 0:
                self._waiting = [queued for queued in self._waiting if queued not in batch]
                return batch
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), left)
            except TimeoutError:
                continue
        return []

    def _batch_limit(self, key: Key) -> int:
        """Return the largest batch size that keeps to the latency target.

        An item that finds a batch running waits for that one and, at most `wait_s`, for expected items, and
        then its own batch runs: half of what remains of the target is the limit of one batch.
        """
        if self._target_s is None or key not in self._latency_models:
            return self.max_batch_size
        return self._latency_models[key].largest((self._target_s - self._wait_s) / 2, self.max_batch_size)

    def _closing_time(self, oldest: _QueuedItem[Key, Item, Result], size: int) -> float:
        """Return the time, on the loop's clock, at which a batch of this size is closed."""
        closing = 0.0
        if size < oldest.group_size:
            closing = oldest.arrived + self._wait_s
        if size < self._expected.get(oldest.key, 0):
            closing = max(closing, self._freed_at + min(self._wait_s, _MAX_WAIT_FRACTION * self._last_s))
        return closing

    async def _run_batch(self, batch: list[_QueuedItem[Key, Item, Result]]) -> None:
        loop, key = asyncio.get_running_loop(), batch[0].key
        started = loop.time()
        try:
            items = [queued.item for queued in batch]
            self._is_busy = True
            results = await loop.run_in_executor(self._worker.thread, self._work, key, items)
        except Exception as error:
            for queued in batch:
                if not queued.result.done():
                    queued.result.set_exception(error)
            return
        finally:
            self._is_busy = False
        self._record(key, len(batch), started, loop.time())
        for queued, result in zip(batch, results, strict=True):
            if not queued.result.done():  # its client may have gone meanwhile
                queued.result.set_result(result)

    def _record(self, key: Key, size: int, started: float, ended: float) -> None:
        """Record a finished batch; the size and closing time of the next follow from it."""
        self._freed_at, self._last_s = ended, ended - started
        self._expected = {key: size + sum(queued.key == key for queued in self._waiting)}
        if key not in self._latency_models and len(self._latency_models) == _MAX_LATENCY_MODELS:
            del self._latency_models[next(iter(self._latency_models))]
        self._latency_models.setdefault(key, LatencyModel()).add(size, self._last_s)
