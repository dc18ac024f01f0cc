"""A generation engine in this process, as a Serve replica has one, without Serve."""

import time

from harmonica.core.artifact import RouterArtifact
from harmonica.models.loading import LoadedModel
from pipelines.config.serve import ServeConfig
from pipelines.serving.batching import Worker
from pipelines.serving.engine import GenerationEngine
from pipelines.serving.image_sampler import ImageSampler

CONFIG = ServeConfig(max_batch_size=8, batch_wait_s=0.01, max_images_per_request=4, max_steps=30)


class FailingEngine(GenerationEngine):
    """An engine that raises `error` if that is set."""

    error: Exception | None = None

    async def describe(self):
        if self.error:
            raise self.error
        return await super().describe()

    async def generate(self, request):
        if self.error:
            raise self.error
        return await super().generate(request)


def make_engine(
    loaded: LoadedModel,
    artifact: RouterArtifact,
    version: str = "3",
    *,
    config: ServeConfig = CONFIG,
    fastest: RouterArtifact | None = None,
    name: str = "tiny",
    worker: Worker | None = None,
) -> FailingEngine:
    """Make an engine with a champion, and maybe a faster router of version `fast`."""
    images = ImageSampler(loaded, over_limit=config.over_limit, max_steps=config.max_steps)
    champion = images.make_plan(artifact, version)
    images.use(champion, images.make_plan(fastest, "fast") if fastest else None)
    return FailingEngine(images, name, config, worker=worker)


def slow_steps(engine: GenerationEngine, seconds: float) -> None:
    """Make every step take this much longer, so that it can be seen."""
    generate = engine.images.generate

    def slowly(requests, served, on_preview):
        def wait(step, predict):
            time.sleep(seconds)
            on_preview(step, predict)

        return generate(requests, served, wait)

    engine.images.generate = slowly  # type: ignore[method-assign]
