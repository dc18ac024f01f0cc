"""Find the router that a replica starts with, and wait for the registry."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from harmonica.core.artifact import RouterArtifact

from .servable_pipeline import has_two_views
from .serve_args import ServeArgs
from .served_plan import is_untrained

REGISTRY_WAIT_S = 600.0
"""Seconds that a replica waits for the registry when it starts."""
Answer = TypeVar("Answer")
logger = logging.getLogger("ray.serve")


async def from_registry(ask: Callable[[], Awaitable[Answer]], wait_s: float = REGISTRY_WAIT_S) -> Answer:
    """Return what the registry answers; while it does not answer, wait for it.

    A replica may be started, in the place of a lost one, while the registry is down.

    Raises:
        ValueError: the registry's answer cannot be used.
        Exception: it has not answered for so many seconds.
    """
    deadline = time.monotonic() + wait_s
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


async def deciding_router(args: ServeArgs, wait_s: float = REGISTRY_WAIT_S) -> RouterArtifact | None:
    """Return the router that decides how a replica's model is sampled.

    A diffusers folder whose transformer has a branch file is sampled by that, or in the pipeline's loop if
    its first router was trained there. None where the model alone decides.

    Raises:
        ValueError: there is no such router.
    """
    if is_untrained(args.router) or not has_two_views(args.model):
        return None
    return await from_registry(lambda: asyncio.to_thread(_first, args), wait_s)


def _first(args: ServeArgs) -> RouterArtifact:
    return args.load(args.current_version())
