"""Images of single (subject, seed, index) rows, sampled together: what a serving replica does, without Ray.

Shapes: N rows, C channels, H W image.
"""

import time
from dataclasses import dataclass

import torch

from harmonica.artifact import RouterArtifact
from harmonica.cache import Reuse
from harmonica.conditions import make_conditions
from harmonica.models.loading import LoadedModel
from harmonica.models.vae import decode_latents, draws_pixels, pixels_per_latent
from harmonica.noise import RowKeys
from harmonica.pictures import encode_png
from harmonica.plan import Plan
from harmonica.samplers import Sampler, make_sampler
from harmonica.sampling import check_plan, sample
from harmonica.text_encoder import OverLimit


@dataclass(frozen=True, slots=True)
class Row:
    """One image to draw; it depends on these alone."""

    subject: int | str
    """A class's label, or a prompt."""
    seed: int
    index: int
    """Number of the image within its request."""
    negative_prompt: str = ""
    """What it should not show, for models that take prompts."""


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
    sampler: Sampler
    plan: Plan
    reuse: Reuse
    version: str


class ImageSampler:
    """A model under a router, which may be exchanged between two trajectories."""

    def __init__(
        self, loaded: LoadedModel, device: str = "cpu", *, over_limit: OverLimit = "truncate"
    ) -> None:
        self.model, self.class_names = loaded.model.to(device), loaded.class_names
        self.device = device
        self._vae = None if draws_pixels(self.model) else loaded.load_vae(device)
        if self._vae is None and not draws_pixels(self.model):
            raise ValueError(
                f"model.in_channels is {self.model.in_channels}, so the model draws latents, and it comes "
                "without a decoder: give model.vae"
            )
        self.conditions = make_conditions(loaded, device, over_limit=over_limit)
        self._router: _Router | None = None

    @property
    def router(self) -> _Router:
        assert self._router is not None, "use() comes first"
        return self._router

    @property
    def image_size(self) -> int:
        """Height and width of the pictures, in pixels."""
        return self.model.sample_size * (1 if self._vae is None else pixels_per_latent(self._vae))

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
        sampler, plan = make_sampler(self.model, artifact.sampler), artifact.plan
        check_plan(plan, sampler)
        self._router = _Router(sampler, plan, artifact.reuse, version)

    def check(self, row: Row) -> None:
        """Prepare a row before it is drawn: its prompts are embedded. From any thread.

        Raises:
            PromptTooLong: a prompt has more tokens than the model reads, and `over_limit` is refuse.
        """
        self.conditions.check(row.subject, row.negative_prompt)

    def draw(self, rows: list[Row]) -> list[Drawing]:
        """All rows in one trajectory."""
        started = time.perf_counter()
        router = self.router
        shape = (self.model.in_channels, self.model.sample_size, self.model.sample_size)
        keys = RowKeys([row.seed for row in rows], [row.index for row in rows])
        noise = torch.from_numpy(keys.start_noise(shape))
        condition = self.conditions.of([row.subject for row in rows], [row.negative_prompt for row in rows])
        images_NCHW = sample(
            router.sampler,
            noise.to(self.device),
            condition,
            router.plan,
            reuse=router.reuse,
            rows=keys,
        )
        if self._vae is not None:
            images_NCHW = decode_latents(self._vae, images_NCHW)
        images_NCHW = images_NCHW.cpu()
        seconds, cur = time.perf_counter() - started, router.plan.cur
        return [Drawing(encode_png(image), router.version, cur, len(rows), seconds) for image in images_NCHW]
