"""Load a model into an engine, with the routers that the registry has for it."""

import asyncio
import logging
from typing import Any

from harmonica.core.artifact import RouterArtifact
from harmonica.models.loading import ModelConfig, load_model
from harmonica.validation.settings import require

from ..config.serve import ServeConfig
from .batching import Worker
from .engine import GenerationEngine
from .first_router import REGISTRY_WAIT_S, deciding_router, from_registry
from .image_sampler import ImageSampler
from .jobs import Metrics
from .loaded_engine import LoadedEngine
from .planned_sampler import PlannedSampler
from .registry_watcher import RegistryWatcher
from .servable_pipeline import servable_pipeline
from .serve_args import ServeArgs

logger = logging.getLogger("ray.serve")


def make_sampler(
    model: ModelConfig, config: ServeConfig, router: RouterArtifact | None = None
) -> PlannedSampler[Any]:
    """Load what generates: a model with a branch file, or a diffusers pipeline.

    Args:
        router: the one to serve, which decides where a pipeline's transformer has a branch file.

    Raises:
        ValueError: the model cannot be loaded or cannot generate images, or settings that it does not follow.
    """
    device = "cuda" if config.use_gpu else "cpu"
    pipeline = servable_pipeline(model, router)
    if pipeline is None:
        loaded = load_model(model, device)
        return ImageSampler(loaded, device, over_limit=config.over_limit, max_steps=config.max_steps)
    require(
        config.over_limit == "truncate",
        "serve.over_limit",
        config.over_limit,
        "give truncate, since a diffusers pipeline reads as much of a prompt as it takes",
    )
    limits = {"max_steps": config.max_steps, "max_pixels": config.max_pixels}
    from .pipeline_sampler import PipelineSampler  # takes seconds to import, so not at the top

    return PipelineSampler(pipeline, model, device, **limits)


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
        images = await asyncio.to_thread(
            make_sampler, self._args.model, config, await self._deciding_router()
        )
        engine = GenerationEngine(images, self._name, config, self._metrics, self._worker)
        watcher = RegistryWatcher(engine, self._args, self._routers)
        try:
            await from_registry(watcher.poll, self._wait_s)
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

    @property
    def _wait_s(self) -> float:
        """Seconds to wait for the registry; none where a version was served before."""
        return 0.0 if self._version else REGISTRY_WAIT_S

    async def _deciding_router(self) -> RouterArtifact | None:
        try:
            return await deciding_router(self._args, self._wait_s)
        except ValueError:
            raise
        except Exception:
            if not self._version:
                raise
            return self._routers.get(self._version)
