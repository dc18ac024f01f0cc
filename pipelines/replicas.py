"""What runs in Ray Serve's replicas: `Sampler` holds the model and draws, `build_api` speaks HTTP."""

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from harmonica.artifact import RouterArtifact
from harmonica.builtin import CHAMPION as BUILTIN_CHAMPION
from harmonica.models.loading import ModelConfig, load_model
from pipelines import registry
from pipelines.config import ServeConfig, WorkflowConfig
from pipelines.drawing import Drawing, ImageSampler, Row
from pipelines.http_errors import Overloaded
from pipelines.images_api import ModelCard, create_app

FOLLOW_S = 30.0
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
    """Router artifact folder to serve instead. Empty without MLflow either: the built-in champion."""

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
        return "builtin" if Path(self.router) == BUILTIN_CHAMPION else Path(self.router).resolve().name


class Sampler:
    """The model under the champion router; one trajectory at a time."""

    async def __init__(self, args: ServeArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        config = args.serve
        torch.set_num_threads(max(1, int(config.num_cpus)))
        self._args = args
        device = "cuda" if config.use_gpu else "cpu"
        self._images = ImageSampler(load_model(args.model, device), device, over_limit=config.over_limit)
        self._load()
        # One thread: one trajectory at a time, with the event loop free for the next requests.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trajectory")
        batching: Any = self._trajectory  # the decorator's setters are not in its type
        batching.set_max_batch_size(config.max_batch_size)
        batching.set_batch_wait_timeout_s(config.batch_wait_s)
        self._follower = asyncio.create_task(self._follow()) if args.tracking_uri else None

    def _load(self) -> None:
        args, version = self._args, self._args.current_version()
        if version == self._images.version:
            return
        if args.tracking_uri:
            artifact, version = registry.load(args.registered_model, registry.CHAMPION, args.tracking_uri)
        else:
            artifact = RouterArtifact.load(args.router)
        self._images.use(artifact, version)
        logger.info("serving router %s of %s, CUR %.3f", version, args.registered_model, artifact.plan.cur)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._args.follow_s)
            try:
                await asyncio.to_thread(self._load)
            except Exception:
                logger.exception("the champion cannot be loaded, %s stays", self._images.version)

    async def describe(self) -> ModelCard:
        return ModelCard(
            model=self._args.registered_model,
            router_version=self._images.version,
            cur=self._images.router.plan.cur,
            class_names=self._images.class_names,
            image_size=self._images.image_size,
            max_images=self._args.serve.max_images_per_request,
        )

    async def draw(self, row: Row) -> Drawing:
        if isinstance(row.subject, str):  # embedded while the trajectory before still runs
            await asyncio.to_thread(self._images.check, row)
        return await self._trajectory(row)

    @serve.batch
    async def _trajectory(self, rows: list[Row]) -> list[Drawing]:
        """Rows that wait together share one cached trajectory, whatever their class and seed."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._images.draw, rows)


class RemoteSampler:
    """`ImageSource` over the Sampler deployment's handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def describe(self) -> ModelCard:
        return await self._call("describe")

    async def draw(self, row: Row) -> Drawing:
        try:
            return await self._call("draw", row)
        except (ActorDiedError, ActorUnavailableError):
            # Serve does not retry what a lost replica was doing. The row's image is the same anywhere.
            return await self._call("draw", row)

    async def _call(self, method: str, *args: Any) -> Any:
        try:
            return await getattr(self._handle, method).remote(*args)
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise Overloaded from error


def build_api() -> FastAPI:
    """The `Api` deployment's app; runs on its replica, where the application's name is known."""
    return create_app(RemoteSampler(serve.get_deployment_handle("Sampler")))
