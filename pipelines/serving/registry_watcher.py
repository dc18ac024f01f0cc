"""Keep a replica's routers up to date with the registry.

The registry is polled; a new champion is tested on the replica, which then changes over to it.
"""

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from harmonica.core.artifact import RouterArtifact
from harmonica.integrations.recorded.even_steps import EvenSteps

from .engine import GenerationEngine
from .requests import RejectedRouter
from .serve_args import ServeArgs
from .served_plan import UNCACHED, ServedPlan

_MOST_STEPS = 8
"""Number of routers for other numbers of steps at most; each is tried out before it is used."""
_NO_THREADS_LEFT = "cannot schedule new futures after"
"""Message of an executor's error in a process that is shutting down."""
logger = logging.getLogger("ray.serve")


class RegistryWatcher:
    """A watcher keeps an engine's routers up to date with the registry.

    A router that does not load, or whose sample is another here than where it was registered, is rejected:
    the router before it stays in use, and the engine's card names the rejected one.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        args: ServeArgs,
        routers: dict[str, RouterArtifact | None] | None = None,
    ) -> None:
        """Watch for an engine.

        Args:
            routers: registered versions that were loaded before, None for those that do not fit; the ones
                loaded from now on are added.
        """
        self._engine, self._args = engine, args
        self._is_final = False  # whether trying the rejected version again is useless
        self._loaded = {} if routers is None else routers
        self._by_steps: dict[str, ServedPlan] = {}
        self._seen: tuple[str, ...] = ()
        self._unreached: set[str] = set()

    async def poll(self) -> None:
        """Poll the registry once, and change over if there is a new router.

        The metrics then name the version that is served.

        Raises:
            ValueError: the first router is rejected, so that there is none to serve.
            Exception: the registry does not answer.
        """
        await self._poll()
        engine = self._engine
        if engine.metrics:
            rejected = engine.rejected.version if engine.rejected else ""
            engine.metrics.serving(engine.images.version, rejected)

    async def _poll(self) -> None:
        engine, images = self._engine, self._engine.images
        version = await asyncio.to_thread(self._args.current_version)
        if version != images.version:
            rejected = engine.rejected
            if rejected is not None and rejected.version == version and self._is_final:
                return
            try:
                champion = await self._try_out(version)
            except Exception as error:
                if not images.version:
                    raise
                self._reject(version, error)
                return
            await self._change(champion)
            logger.info(
                "serving router %s of %s, CUR %.3f", version, self._args.registered_model, champion.plan.cur
            )
        elif tuple(await asyncio.to_thread(self._args.versions)) != self._seen or await self._reaches_more():
            await self._change(images.champion)  # a faster one may be among the new
        engine.rejected = None

    async def resume(self, version: str) -> None:
        """Use a version that was the champion before, while the registry does not answer.

        Raises:
            Exception: it was not loaded before, or does not fit.
        """
        self._engine.images.use(await self._try_out(version))

    async def run(self) -> None:
        """Poll until this process ends."""
        while True:
            await asyncio.sleep(self._args.follow_s)
            try:
                await self.poll()
            except Exception as error:
                if isinstance(error, RuntimeError) and _NO_THREADS_LEFT in str(error):
                    return
                version = self._engine.images.version
                logger.exception("the champion cannot be looked up, %s stays", version)

    def _reject(self, version: str, error: Exception) -> None:
        self._is_final = isinstance(error, ValueError)
        self._engine.rejected = RejectedRouter(version, str(error))
        logger.warning(
            "router %s of %s is rejected, %s stays: %s",
            version,
            self._args.registered_model,
            self._engine.images.version,
            error,
        )

    async def _try_out(self, version: str) -> ServedPlan:
        """Load a version, check that it reproduces its sample, and warm its plan up."""
        images = self._engine.images
        if version == UNCACHED:
            own = images.own_sampler(self._args.model.path)
            uncached: ServedPlan = await asyncio.to_thread(images.make_uncached, own)
            await self._engine.warm_up(uncached)
            return uncached
        if (even := EvenSteps.named(version)) is not None:
            own = images.own_sampler(self._args.model.path)
            make = partial(images.make_even, own, even, version)
            spread: ServedPlan = await self._engine.batcher.run_between_batches(make)
            await self._engine.warm_up(spread)
            return spread
        artifact = self._loaded.get(version)
        if artifact is None:
            artifact = await asyncio.to_thread(self._args.load, version)
        served: ServedPlan = await asyncio.to_thread(images.make_plan, artifact, version)
        # In the trajectories' thread: two trajectories at once would slow down each other.
        await self._engine.batcher.run_between_batches(partial(images.try_out, artifact, served))
        await self._engine.warm_up(served)  # before it takes over: a replica that is ready is warm
        return served

    async def _change(self, champion: ServedPlan) -> None:
        """Use a champion, and the registered routers that work beside it.

        They are the fastest one, for quality low, and for each other number of steps the newest.
        """
        fastest = champion
        self._seen = tuple(await asyncio.to_thread(self._args.versions))
        versions = self._seen
        costs = {version: await self._cost(version) for version in versions}
        for version in sorted(costs, key=lambda each: costs[each]):
            if version == champion.version or costs[version] == float("inf"):
                break
            try:
                fastest = await self._try_out(version)
                break
            except Exception as error:
                logger.info("router %s is not used for quality low: %s", version, error)
        self._by_steps = await self._for_other_steps(versions, champion, fastest)
        self._engine.images.use(champion, fastest, tuple(self._by_steps.values()))

    async def _for_other_steps(
        self, versions: Sequence[str], champion: ServedPlan, fastest: ServedPlan
    ) -> dict[str, ServedPlan]:
        """Return the newest working router of each other number of steps."""
        tried = self._by_steps | {fastest.version: fastest}
        found: dict[str, ServedPlan] = {}
        steps = {champion.config.num_inference_steps}
        for version in versions:
            artifact = self._loaded.get(version)
            if artifact is None or artifact.sampler.num_inference_steps in steps:
                continue
            if len(found) == _MOST_STEPS:
                logger.info("router %s is left out: there are %d for other steps", version, _MOST_STEPS)
                break
            try:
                found[version] = tried.get(version) or await self._try_out(version)
                steps.add(artifact.sampler.num_inference_steps)
            except Exception as error:
                logger.info("router %s is not used for its number of steps: %s", version, error)
        return found

    async def _reaches_more(self) -> bool:
        """Return whether a version that was out of reach no longer is."""
        tried, self._unreached = self._unreached, set()
        for version in tried:
            await self._cost(version)
        return bool(tried - self._unreached)

    async def _cost(self, version: str) -> float:
        """Return the number of multiply-accumulates of an image.

        It is infinite if the version does not fit this model.
        """
        if version not in self._loaded:  # a registered version never changes
            try:
                artifact = await asyncio.to_thread(self._args.load, version)
                await asyncio.to_thread(self._engine.images.make_plan, artifact, version)
                self._loaded[version] = artifact
            except Exception as error:
                logger.info("router %s of %s is left out: %s", version, self._args.registered_model, error)
                if isinstance(error, ValueError):
                    self._loaded[version] = None
                else:
                    self._unreached.add(version)  # the next poll tries it again
        found = self._loaded.get(version)
        if found is None:
            return float("inf")
        return found.macs_full / found.ideal_speedup * (2 if found.sampler.is_guided else 1)
