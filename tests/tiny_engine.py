"""The endpoint's source of images in this process: the real one, that of a Serve replica without Serve."""

import time

from harmonica.core.artifact import RouterArtifact
from harmonica.models.loading import LoadedModel
from pipelines.config.serve import ServeConfig
from pipelines.serving.engine import Studio
from pipelines.serving.image_sampler import ImageSampler

CONFIG = ServeConfig(max_batch_size=8, batch_wait_s=0.01, max_images_per_request=4, max_steps=30)


class FailingStudio(Studio):
    """Fails where it is told to."""

    error: Exception | None = None

    async def describe(self):
        if self.error:
            raise self.error
        return await super().describe()

    async def draw(self, order):
        if self.error:
            raise self.error
        return await super().draw(order)


def make_studio(
    loaded: LoadedModel,
    artifact: RouterArtifact,
    version: str = "3",
    *,
    config: ServeConfig = CONFIG,
    fastest: RouterArtifact | None = None,
) -> FailingStudio:
    """A studio under a champion, and maybe a faster router that is called `fast`."""
    images = ImageSampler(loaded, over_limit=config.over_limit, max_steps=config.max_steps)
    champion = images.make_router(artifact, version)
    images.use(champion, images.make_router(fastest, "fast") if fastest else None)
    return FailingStudio(images, "tiny", config)


def slow_steps(studio: Studio, seconds: float) -> None:
    """Every step takes so much longer, so that it can be seen."""
    draw = studio.images.draw

    def slowly(rows, router, on_preview):
        def wait(step, predict):
            time.sleep(seconds)
            on_preview(step, predict)

        return draw(rows, router, wait)

    studio.images.draw = slowly  # type: ignore[method-assign]
