"""Which routers a replica serves: the registry's champion, taken up as soon as it has proved to draw here."""

import asyncio
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harmonica.builtin import CHAMPION as BUILTIN_CHAMPION
from harmonica.cli.sample import own_sampler
from harmonica.core.artifact import RouterArtifact
from harmonica.core.golden_sample import check_sample
from harmonica.io.paths import local
from harmonica.models.loading import ModelConfig
from harmonica.validation.settings import told
from pipelines.config.serve import ServeConfig
from pipelines.config.workflow import WorkflowConfig
from pipelines.serving.engine import Studio
from pipelines.serving.image_sampler import UNCACHED, Router
from pipelines.serving.requests import Refusal
from pipelines.tracking import registry

FOLLOW_S = 5.0
_MOST_VERSIONS = 50
_NO_THREADS_LEFT = "cannot schedule new futures after"
"""What an executor says in a process that is ending."""
logger = logging.getLogger("ray.serve")


class ServeArgs(BaseModel):
    """`args:` of the application in a Serve YAML file."""

    model_config = ConfigDict(extra="forbid")

    serve: ServeConfig = Field(default_factory=ServeConfig)
    """Host and port are Serve's own here: `http_options`."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """The denoiser."""
    registered_model: str = WorkflowConfig().registered_model
    """Name in MLflow's registry, and the `model` that clients see."""
    tracking_uri: str = ""
    """MLflow, followed to the registered model's champion. Empty: MLFLOW_TRACKING_URI."""
    follow_s: float = Field(FOLLOW_S, gt=0)
    """Seconds between looks at which version is the champion; running replicas change over to it."""
    router: str = ""
    """Router artifact folder to serve instead, or `uncached`: every branch is computed, under the model's own
    sampler. Empty without MLflow either: the built-in champion."""

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """
        Raises:
            SettingError: names the field, the value and the cure.
        """
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise told(error, cls) from None

    def resolved(self) -> "ServeArgs":
        """With exactly one of `router` and `tracking_uri` set."""
        uri = "" if self.router else self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        return self.model_copy(
            update={"tracking_uri": uri, "router": "" if uri else self.router or str(BUILTIN_CHAMPION)}
        )

    def current_version(self) -> str:
        """Of the router that is to be served now: the champion's, or the artifact folder's name."""
        if self.tracking_uri:
            return registry.resolve(self.registered_model, registry.CHAMPION, self.tracking_uri)
        if self.router == UNCACHED:
            return UNCACHED
        return "builtin" if Path(self.router) == BUILTIN_CHAMPION else local(self.router, "router").name

    def load(self, version: str) -> RouterArtifact:
        """A registered version, or the artifact folder."""
        if self.tracking_uri:
            return registry.load_version(self.registered_model, version, self.tracking_uri)
        return RouterArtifact.load(self.router)

    def versions(self) -> list[str]:
        """All that are registered, newest first; of an artifact folder none."""
        if not self.tracking_uri:
            return []
        return registry.newest_versions(self.registered_model, self.tracking_uri, _MOST_VERSIONS)


class Follower:
    """Keeps a studio's routers up to date. What does not load, or draws something else here than where it
    was registered, is refused: the router before stays, and the studio's card says so."""

    def __init__(self, studio: Studio, args: ServeArgs) -> None:
        self._studio, self._args = studio, args
        self._is_final = False  # nothing to be gained from trying what was refused again
        self._loaded: dict[str, RouterArtifact | None] = {}
        self._seen: tuple[str, ...] = ()

    async def look(self) -> None:
        """Look once, change over where there is something new, and say what is served.

        Raises:
            ValueError: the first router of all is refused.
            Exception: the registry does not answer.
        """
        await self._look()
        studio = self._studio
        if studio.metrics:
            studio.metrics.serving(studio.images.version, studio.refused.version if studio.refused else "")

    async def _look(self) -> None:
        """Change over where there is something new.

        Raises:
            ValueError: the first router of all is refused.
            Exception: the registry does not answer.
        """
        studio, images = self._studio, self._studio.images
        version = await asyncio.to_thread(self._args.current_version)
        if version != images.version:
            refused = studio.refused
            if refused is not None and refused.version == version and self._is_final:
                return
            try:
                champion = await self._try_out(version)
            except Exception as error:
                if not images.version:
                    raise
                self._refuse(version, error)
                return
            await self._change(champion)
            logger.info(
                "serving router %s of %s, CUR %.3f", version, self._args.registered_model, champion.plan.cur
            )
        elif tuple(await asyncio.to_thread(self._args.versions)) != self._seen:
            await self._change(images.router)  # a faster one may be among the new
        studio.refused = None

    async def follow(self) -> None:
        """Look until this process ends."""
        while True:
            await asyncio.sleep(self._args.follow_s)
            try:
                await self.look()
            except Exception as error:
                if isinstance(error, RuntimeError) and _NO_THREADS_LEFT in str(error):
                    return
                version = self._studio.images.version
                logger.exception("the champion cannot be looked up, %s stays", version)

    def _refuse(self, version: str, error: Exception) -> None:
        self._is_final = isinstance(error, ValueError)
        self._studio.refused = Refusal(version, str(error))
        logger.warning(
            "router %s of %s is refused, %s stays: %s",
            version,
            self._args.registered_model,
            self._studio.images.version,
            error,
        )

    async def _try_out(self, version: str) -> Router:
        """A version as it is used here, once its sample is what it should be."""
        images = self._studio.images
        if version == UNCACHED:
            own = own_sampler(images.loaded, self._args.model.path)
            return await asyncio.to_thread(images.make_uncached, own)
        artifact = await asyncio.to_thread(self._args.load, version)
        router = await asyncio.to_thread(images.make_router, artifact, version)
        # In the trajectories' thread: a second one beside it would slow down both.
        await self._studio.batcher.in_thread(partial(check_sample, artifact, router.sampler))
        return router

    async def _change(self, champion: Router) -> None:
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
        self._studio.images.use(champion, fastest)

    async def _cost(self, version: str) -> float:
        """Multiply-accumulates of an image, infinite where the version cannot be used with this model."""
        if version not in self._loaded:  # a registered version never changes
            try:
                artifact = await asyncio.to_thread(self._args.load, version)
                await asyncio.to_thread(self._studio.images.make_router, artifact, version)
                self._loaded[version] = artifact
            except Exception as error:
                logger.info("router %s of %s is left out: %s", version, self._args.registered_model, error)
                if isinstance(error, ValueError):
                    self._loaded[version] = None
                else:
                    self._seen = ()  # out of reach: the next look tries it again
        found = self._loaded.get(version)
        if found is None:
            return float("inf")
        return found.macs_full / found.ideal_speedup * (2 if found.sampler.is_guided else 1)
