"""Hand out the engines of several models, not all of them loaded at once.

Which one is unloaded for another is decided by Serve's multiplexing: the least recently used. What that
leaves open is done here: requests that wait for the same model share one load and then run together, a model
that cannot be loaded is not tried again at once, and what was last known of an unloaded model is kept.
"""

import asyncio
import dataclasses
import logging
import math
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from .batching import Overloaded, TimedOut
from .engine import GenerationEngine
from .loaded_engine import LoadedEngine
from .requests import Catalog, ModelCard, ModelState, ModelUnavailable

Load = Callable[[str], Awaitable[LoadedEngine]]
_RETRY_S = 30.0
"""Seconds before a model that could not be loaded is tried again; each time another one may be unloaded."""
logger = logging.getLogger("ray.serve")


@dataclasses.dataclass(eq=False)
class _Group:
    """The requests that wait for one load of a model."""

    task: asyncio.Task[LoadedEngine] | None = None
    waiting: int = 0
    held: LoadedEngine | None = None
    """Kept from being unloaded until all of them have it; else a request for another model, which waits for
    this load to be done, would go first."""

    def release(self) -> None:
        """Let the model be unloaded once nobody waits for it any more."""
        if self.held is not None and self.waiting == 0:
            self.held.release()
            self.held = None


@dataclasses.dataclass(frozen=True)
class _Failure:
    error: Exception
    until: float

    def refusal(self, model: str) -> ModelUnavailable:
        seconds = max(1, math.ceil(self.until - time.monotonic()))
        return ModelUnavailable(model, str(self.error), seconds)


class MultiplexedEngines:
    """Engines by the names of their models, loaded when they are asked for.

    Args:
        names: names of the models, the first for requests that name none.
        load: loads a model, or returns it if it is loaded: a function that Serve's multiplexing wraps, or
            `keep_loaded`.
        max_waiting: number of requests that wait for a model to be loaded at most.
    """

    def __init__(self, names: Sequence[str], load: Load, *, max_waiting: int) -> None:
        self._names, self._load, self._max_waiting = tuple(names), load, max_waiting
        self._groups: dict[str, _Group] = {}
        self._loaded: weakref.WeakValueDictionary[str, LoadedEngine] = weakref.WeakValueDictionary()
        self._cards: dict[str, ModelCard] = {}
        self._failures: dict[str, _Failure] = {}

    async def load_all(self) -> None:
        """Load every model once, the first one last, so that it stays.

        Those that cannot be loaded are left to `describe`.

        Raises:
            Exception: no model can be loaded; what loading the first has raised.
        """
        for name in reversed(self._names):
            try:
                async with self.using(name):
                    pass
            except ModelUnavailable:
                continue
        if not self._cards:
            raise self._failures[self._names[0]].error

    @asynccontextmanager
    async def using(self, name: str = "", timeout_s: float | None = None) -> AsyncIterator[GenerationEngine]:
        """Load a model unless it is loaded, and keep it loaded within the context.

        Args:
            name: name of the model. Default: the first.
            timeout_s: how long to wait until it is loaded. Default: as long as it takes.

        Raises:
            ModelUnavailable: it cannot be loaded.
            Overloaded: too many wait for it.
            TimedOut: it is not loaded in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                loaded, engine = await self._acquire(name or self._names[0])
        except TimeoutError:
            raise TimedOut from None
        try:
            yield engine
        finally:
            loaded.release()

    async def _acquire(self, name: str) -> tuple[LoadedEngine, GenerationEngine]:
        while True:
            failure = self._failures.get(name)
            if failure is not None and time.monotonic() < failure.until:
                raise failure.refusal(name)
            group = self._groups.get(name)
            if group is None:
                group = self._groups[name] = _Group()
                group.task = asyncio.create_task(self._load_for(name, group))
                group.task.add_done_callback(_retrieve)
            if group.waiting >= self._max_waiting:
                raise Overloaded
            group.waiting += 1
            assert group.task is not None
            try:
                loaded = await asyncio.shield(group.task)
                engine = loaded.acquire()
                if engine is not None:  # else it was unloaded meanwhile
                    return loaded, engine
            finally:
                group.waiting -= 1
                group.release()

    async def _load_for(self, name: str, group: _Group) -> LoadedEngine:
        try:
            loaded = await self._load(name)
            engine = loaded.acquire()
            if engine is not None:
                group.held = loaded
                self._cards[name] = await engine.describe()
        except Exception as error:
            logger.error(
                "model %s could not be loaded: %s", name, error, exc_info=not isinstance(error, ValueError)
            )
            failure = self._failures[name] = _Failure(error, time.monotonic() + _RETRY_S)
            raise failure.refusal(name) from error
        finally:
            del self._groups[name]  # those that come from now on are no part of the group
        self._loaded[name] = loaded
        self._failures.pop(name, None)
        group.release()
        return loaded

    async def describe(self) -> Catalog:
        """Describe all models.

        Those that are not loaded are described as they were when they last were.
        """
        for name, loaded in list(self._loaded.items()):
            if loaded.engine is not None:
                self._cards[name] = await loaded.engine.describe()
        return Catalog(tuple(self._state(name) for name in self._names))

    def _state(self, name: str) -> ModelState:
        card, failure, loaded = self._cards.get(name), self._failures.get(name), self._loaded.get(name)
        is_loaded = loaded is not None and loaded.engine is not None
        if card is not None and not is_loaded:
            group = self._groups.get(name)
            card = dataclasses.replace(card, waiting=group.waiting if group else 0)
        return ModelState(name, card, is_loaded, str(failure.error) if failure else "")

    def check_health(self) -> None:
        """Check that no trajectory of a loaded model has stalled.

        Raises:
            RuntimeError: one has.
        """
        for loaded in list(self._loaded.values()):
            if loaded.engine is not None:
                loaded.engine.check_health()


def keep_loaded(load: Load) -> Load:
    """Return a function that loads each model once and never unloads one."""
    kept: dict[str, LoadedEngine] = {}

    async def loaded(name: str) -> LoadedEngine:
        if name not in kept:
            kept[name] = await load(name)
        return kept[name]

    return loaded


def _retrieve(task: asyncio.Task[LoadedEngine]) -> None:
    """Look at a task's error, which nobody else does if every client has gone."""
    if not task.cancelled():
        task.exception()
