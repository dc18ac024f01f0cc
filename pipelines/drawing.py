"""Images of single (label, seed, index) rows, sampled together: what a serving replica does, without Ray.

Shapes: N rows, C channels, H W image.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from harmonica.artifact import RouterArtifact
from harmonica.cache import Reuse
from harmonica.models.loading import LoadedModel
from harmonica.noise import row_noise
from harmonica.pictures import encode_png
from harmonica.plan import Plan
from harmonica.samplers import Ddim
from harmonica.sampling import check_plan, sample


@dataclass(frozen=True, slots=True)
class Row:
    """One image to draw; it depends on these three numbers alone."""

    label: int
    seed: int
    index: int
    """Number of the image within its request."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """One image, and how it came about."""

    png: bytes
    router_version: str
    cur: float
    batch_size: int
    """Images that shared the trajectory."""
    seconds: float
    """Of the trajectory."""


@dataclass(frozen=True, slots=True)
class _Router:
    sampler: Ddim
    plan: Plan
    reuse: Reuse
    version: str


class ImageSampler:
    """A model under a router, which may be exchanged between two trajectories."""

    def __init__(self, loaded: LoadedModel, device: str = "cpu") -> None:
        self.model, self.class_names = loaded.model.to(device), loaded.class_names
        self.device = device
        if self.model.in_channels not in (1, 3):
            raise ValueError(
                f"model.in_channels is {self.model.in_channels}: such a model draws latents, and only pixel "
                "models (1 or 3 channels) can be served"
            )
        self._router: _Router | None = None

    @property
    def router(self) -> _Router:
        assert self._router is not None, "use() comes first"
        return self._router

    @property
    def version(self) -> str:
        """Of the router in use; empty before the first."""
        return self._router.version if self._router else ""

    def use(self, artifact: RouterArtifact, version: str) -> None:
        """Draw under this router from the next trajectory on.

        Raises:
            ValueError: the router was made for another model.
        """
        artifact.check(self.model, artifact.sampler)
        sampler, plan = Ddim(self.model, artifact.sampler), artifact.plan
        check_plan(plan, sampler)
        self._router = _Router(sampler, plan, artifact.reuse, version)

    def draw(self, rows: list[Row]) -> list[Drawing]:
        """All rows in one trajectory."""
        started = time.perf_counter()
        router = self.router
        shape = (self.model.in_channels, self.model.sample_size, self.model.sample_size)
        noise = torch.from_numpy(np.stack([row_noise(row.seed, row.index, shape) for row in rows]))
        labels = torch.tensor([row.label for row in rows])
        images_NCHW = sample(
            router.sampler, noise.to(self.device), labels.to(self.device), router.plan, reuse=router.reuse
        ).cpu()
        seconds, cur = time.perf_counter() - started, router.plan.cur
        return [Drawing(encode_png(image), router.version, cur, len(rows), seconds) for image in images_NCHW]
