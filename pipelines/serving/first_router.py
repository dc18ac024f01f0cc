"""Find the router that a replica starts with, and wait for the registry."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from harmonica.core.artifact import RouterArtifact

from .registry_watcher import ServeArgs
from .servable_pipeline import has_two_views
from .served_plan import UNCACHED

_REGISTRY_WAIT_S = 600.0
Answer = TypeVar("Answer")
logger = logging.getLogger("ray.serve")


async def from_registry(ask: Callable[[], Awaitable[Answer]]) -> Answer:
    """Return what the registry answers; while it does not answer, wait for it.

    A replica may be started, in the place of a lost one, while the registry is down.

    Raises:
        ValueError: the registry's answer cannot be used.
        Exception: it has not answered for ten minutes.
    """
    deadline = time.monotonic() + _REGISTRY_WAIT_S
    while True:
        try:
            return await ask()
        except ValueError:
            raise
        except Exception as error:
            if time.monotonic() > deadline:
                raise
            logger.warning("the registry does not answer yet: %s", error)
            await asyncio.sleep(2)


async def deciding_router(args: ServeArgs) -> RouterArtifact | None:
    """Return the router that decides how a replica's model is sampled.

    A diffusers folder whose transformer has a branch file is sampled by that, or in the pipeline's loop if
    its first router was trained there. None where the model alone decides.

    Raises:
        ValueError: there is no such router.
    """
    if args.router == UNCACHED or not has_two_views(args.model):
        return None
    return await from_registry(lambda: asyncio.to_thread(_first, args))


def _first(args: ServeArgs) -> RouterArtifact:
    return args.load(args.current_version())
