"""Load a model into an engine, with the routers that the registry has for it."""

import asyncio
import logging
import time
from typing import Any

from harmonica.core.artifact import RouterArtifact
from harmonica.models.loading import ModelConfig, load_model
from harmonica.validation.settings import require

from ..config.serve import ServeConfig
from .batching import Worker
from .engine import GenerationEngine
from .image_sampler import ImageSampler
from .jobs import Metrics
from .loaded_engine import LoadedEngine
from .pipeline_folder import pipeline_folder
from .pipeline_sampler import PipelineSampler
from .planned_sampler import PlannedSampler
from .registry_watcher import RegistryWatcher
from .serve_args import ServeArgs

_REGISTRY_WAIT_S = 600.0
logger = logging.getLogger("ray.serve")


def make_sampler(model: ModelConfig, config: ServeConfig) -> PlannedSampler[Any]:
    """Load what generates: a model with a branch file, or a diffusers pipeline.

    Raises:
        ValueError: the model cannot be loaded or cannot generate images, or settings that it does not follow.
    """
    device = "cuda" if config.use_gpu else "cpu"
    folder = pipeline_folder(model)
    if folder is None:
        loaded = load_model(model, device)
        return ImageSampler(loaded, device, over_limit=config.over_limit, max_steps=config.max_steps)
    require(
        config.over_limit == "truncate",
        "serve.over_limit",
        config.over_limit,
        "give truncate, since a diffusers pipeline reads as much of a prompt as it takes",
    )
    limits = {"max_steps": config.max_steps, "max_pixels": config.max_pixels}
    return PipelineSampler(folder, model, device, **limits)


class EngineLoader:
    """Loads the engine of one model, again each time that the model was unloaded.

    The routers of a registry are kept meanwhile, so that they are fetched once, and are there if the registry
    does not answer.

    Args:
        args: settings of this model.
        name: what clients call it.
        metrics: its measurements.
        worker: runs its batches.
    """

    def __init__(self, args: ServeArgs, name: str, metrics: Metrics, worker: Worker) -> None:
        self._args, self._name, self._metrics, self._worker = args, name, metrics, worker
        self._routers: dict[str, RouterArtifact | None] = {}
        self._version = ""
        """The last champion that was served."""

    async def load(self) -> LoadedEngine:
        """Load the model and its routers, and try these out.

        Raises:
            ValueError: the model cannot be loaded, or its champion is rejected.
            Exception: the registry does not answer.
        """
        config = self._args.serve
        images = await asyncio.to_thread(make_sampler, self._args.model, config)
        engine = GenerationEngine(images, self._name, config, self._metrics, self._worker)
        watcher = RegistryWatcher(engine, self._args, self._routers)
        try:
            await _first_poll(watcher, _REGISTRY_WAIT_S if not self._version else 0)
        except ValueError:
            raise
        except Exception as error:
            if not self._version:
                raise
            logger.warning("the registry does not answer, %s stays champion: %s", self._version, error)
            await watcher.resume(self._version)
        self._version = engine.images.version
        await engine.fix_batch_size()
        return LoadedEngine(engine, asyncio.create_task(watcher.run()) if self._args.tracking_uri else None)


async def _first_poll(watcher: RegistryWatcher, wait_s: float) -> None:
    """Load the first router; while the registry does not answer, wait for it.

    A replica may be started, in the place of a lost one, while the registry is down.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            await watcher.poll()
            return
        except ValueError:
            raise
        except Exception as error:
            if time.monotonic() > deadline:
                raise
            logger.warning("the registry does not answer yet: %s", error)
            await asyncio.sleep(2)
