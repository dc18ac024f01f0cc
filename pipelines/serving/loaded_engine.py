"""Count the requests of a loaded model, and unload it after the last of them."""

import asyncio
import gc
import threading

import torch

from .engine import GenerationEngine


class LoadedEngine:
    """A loaded model's engine is unloaded once no request uses it.

    Serve's multiplexing calls `__del__` in a thread when it unloads a model, and has the next one loaded once
    that has returned. It returns when the memory is free, so that there are never more models than allowed.

    Args:
        engine: generates with the model.
        following: keeps the engine's routers up to date with a registry.
    """

    def __init__(self, engine: GenerationEngine, following: asyncio.Task[None] | None = None) -> None:
        self._engine: GenerationEngine | None = engine
        self._following = following
        self._loop, self._loop_thread = asyncio.get_running_loop(), threading.get_ident()
        self._released = threading.Condition()
        self._num_users = 0

    @property
    def engine(self) -> GenerationEngine | None:
        """Return the engine, or None once the model is unloaded."""
        return self._engine

    def acquire(self) -> GenerationEngine | None:
        """Return the engine for a request, which calls `release` in the end.

        It is None, and nothing is to be released, if the model is unloaded.
        """
        with self._released:
            self._num_users += self._engine is not None
            return self._engine

    def release(self) -> None:
        """Let the model be unloaded, as far as one request is concerned."""
        with self._released:
            self._num_users -= 1
            self._released.notify_all()

    def __del__(self) -> None:
        # Python calls it too, on any thread, when nothing refers to it any more: Serve has before, or the
        # process ends.
        if self._engine is None or not self._loop.is_running() or threading.get_ident() == self._loop_thread:
            return
        with self._released:
            self._released.wait_for(lambda: self._num_users == 0)
            engine, self._engine = self._engine, None
        asyncio.run_coroutine_threadsafe(_stop(engine, self._following), self._loop).result()
        del engine
        self._following = None
        gc.collect()  # models have cycles
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


async def _stop(engine: GenerationEngine, following: asyncio.Task[None] | None) -> None:
    if following is not None:
        following.cancel()
        await asyncio.wait((following,))
    # The worker refers to what it did last until it does something else.
    await engine.batcher.run_between_batches(lambda: None)
    engine.close()
