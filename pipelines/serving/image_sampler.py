"""Images of single (subject, seed, index) rows, sampled together: what a serving replica does, without Ray.

Shapes: N rows, C channels, H W image.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.sampling import check_plan, sample
from harmonica.data.conditions import check_conditions, make_conditions
from harmonica.data.text_encoder import OverLimit
from harmonica.models.loading import LoadedModel
from harmonica.models.vae import check_vae, decode_latents, draws_pixels, pixels_per_latent
from harmonica.samplers import Sampler, SamplerConfig, make_sampler
from harmonica.samplers.noise import RowKeys

Quality = Literal["low", "medium", "high"]
"""high computes every branch, medium is the champion's plan, low that of the fastest router there is."""
UNCACHED = "uncached"
"""Version of what draws `high`."""
_KEPT_SETTINGS = 16


class SettingRefused(ValueError):
    """A setting that this model or router cannot draw with; the message begins with its name."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message  # Ray's own copies of errors have a traceback for a text


@dataclass(frozen=True, slots=True)
class Row:
    """One image to draw; under one router it depends on these alone."""

    subject: int | str = field(repr=False)  # prompts are kept out of logs
    """A class's label, or a prompt."""
    seed: int
    index: int
    """Number of the image within its request."""
    negative_prompt: str = field(default="", repr=False)
    """What it should not show, for models that take prompts."""
    guidance_scale: float | None = None
    """Default: the sampler's, which is the only one where a router is used."""


@dataclass(frozen=True, eq=False, slots=True)
class Router:
    """A plan, and the sampler it was made for. Equal to itself alone: a row is drawn under the very one it
    was checked against, though another becomes champion meanwhile."""

    sampler: Sampler
    plan: Plan
    reuse: Reuse
    version: str
    ideal_speedup: float = 1.0
    scores: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    """T x B, rounded, for people to look at."""


@contextmanager
def _refusing() -> Iterator[None]:
    """What a sampler's settings refuse is the client's matter."""
    try:
        yield
    except ValueError as error:
        raise SettingRefused(str(error).removeprefix("sampler.")) from error


def check_is_whole(loaded: LoadedModel) -> None:
    """Whether a model came with all that pictures take.

    Raises:
        ValueError: it draws latents without a usable decoder, or takes prompts without a text encoder.
    """
    if not draws_pixels(loaded.model):
        if loaded.vae_folder is None:
            raise ValueError(
                f"model.vae is '' and the model draws latents, of {loaded.model.in_channels} channels, and "
                "comes without a decoder: give one"
            )
        check_vae(loaded.vae_folder)
    check_conditions(loaded)


OnPreview = Callable[[int, Callable[[Sequence[int]], Tensor]], None]
"""Called with the number of steps done and what makes the predicted images (N, C, H, W) of some rows."""


class ImageSampler:
    """A model under its routers, which may be exchanged between two trajectories."""

    def __init__(
        self,
        loaded: LoadedModel,
        device: str = "cpu",
        *,
        over_limit: OverLimit = "truncate",
        max_steps: int = 100,
    ) -> None:
        check_is_whole(loaded)
        self.loaded = loaded
        self.model, self.class_names = loaded.model.to(device), loaded.class_names
        self.device, self._max_steps = device, max_steps
        self._vae = None if draws_pixels(self.model) else loaded.load_vae(device)
        self.conditions = make_conditions(loaded, device, over_limit=over_limit)
        self._routers: dict[Quality, Router] = {}
        self.num_rows = 0
        """Of every trajectory, once that is fixed."""
        self._uncached: dict[int, Router] = {}

    @property
    def router(self) -> Router:
        """The champion."""
        assert "medium" in self._routers, "use() comes first"
        return self._routers["medium"]

    @property
    def image_size(self) -> int:
        """Height and width of the pictures, in pixels."""
        return self.model.sample_size * (1 if self._vae is None else pixels_per_latent(self._vae))

    @property
    def version(self) -> str:
        """Of the champion in use; empty before the first."""
        return self.router.version if self._routers else ""

    def fix_rows(self, most: int) -> int:
        """Draw every trajectory from now on in one shape, so that an image is the same to the last bit
        whatever is drawn beside it; returns the rows of that shape.

        Kernels are picked by shape, and one shape has one set of them. Within it they may still treat the
        rows of a batch differently (by blocks, or by what is left of the last one): one image is drawn in
        every slot at once, and where they differ it is one row from then on. That takes two trajectories, so
        call it from the thread that draws, once `use` has been called.

        Args:
            most: rows of a trajectory.
        """
        self.num_rows = most
        if most == 1:
            return 1
        row, is_same = Row(0 if self.class_names else "", 0, 0), True
        for quality in ("medium", "high"):
            images_NCHW = self.draw([row] * most, self.router_for(quality))
            is_same &= all(torch.equal(image_CHW, images_NCHW[0]) for image_CHW in images_NCHW)
        self.num_rows = most if is_same else 1
        return self.num_rows

    def make_router(self, artifact: RouterArtifact, version: str) -> Router:
        """A router as it is used here.

        Raises:
            ValueError: the router was made for another model.
        """
        artifact.check(self.model, artifact.sampler)
        sampler, plan = make_sampler(self.model, artifact.sampler), artifact.plan
        check_plan(plan, sampler)
        scores = [[round(score, 3) for score in row] for row in artifact.logits_TB.sigmoid().tolist()]
        return Router(
            sampler, plan, artifact.reuse, version, artifact.ideal_speedup, tuple(map(tuple, scores))
        )

    def make_uncached(self, config: SamplerConfig) -> Router:
        """What computes every branch, as the champion of a model that has no router.

        Raises:
            ValueError: the sampler does not go with the model.
        """
        plan = Plan.full(config.num_inference_steps, len(self.model.branches))
        return Router(make_sampler(self.model, config), plan, "hold", UNCACHED)

    def use(self, champion: Router, fastest: Router | None = None) -> None:
        """Draw under these from the next row on; `low` is the champion too where no other is faster."""
        self._routers = {"medium": champion, "low": fastest or champion}
        is_uncached = champion.version == UNCACHED
        self._uncached = {champion.plan.num_steps: champion} if is_uncached else {}

    def router_for(
        self, quality: Quality, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> Router:
        """What a quality is drawn under; only `high` leaves a choice of steps and guidance.

        Raises:
            SettingRefused: the router was made for other settings, or there is no such setting.
        """
        if quality == "high":
            config = self.router.sampler.config
            if guidance_scale is not None:
                with _refusing():
                    replace(config, guidance_scale=guidance_scale)
            return self._uncached_of(num_inference_steps or config.num_inference_steps)
        router = self._routers[quality]
        asked = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        for name, value in asked.items():
            made_for = getattr(router.sampler.config, name)
            if value is not None and value != made_for:
                raise SettingRefused(
                    f"{name} is {value} and router {router.version} of quality {quality} was made for "
                    f"{made_for}: leave it out, or give quality high, which uses no router"
                )
        return router

    def _uncached_of(self, num_inference_steps: int) -> Router:
        made = self._uncached
        if num_inference_steps in made:
            return made[num_inference_steps]
        config = self.router.sampler.config
        most = max(self._max_steps, config.num_inference_steps)
        if num_inference_steps > most:
            raise SettingRefused(f"num_inference_steps is {num_inference_steps}: give 2 to {most}")
        with _refusing():
            router = self.make_uncached(replace(config, num_inference_steps=num_inference_steps))
        if len(made) == _KEPT_SETTINGS:
            del made[next(iter(made))]
        made[num_inference_steps] = router
        return router

    def check(self, row: Row) -> None:
        """Prepare a row before it is drawn: its prompts are embedded. From any thread.

        Raises:
            PromptTooLong: a prompt has more tokens than the model reads, and `over_limit` is refuse.
        """
        self.conditions.check(row.subject, row.negative_prompt)

    def draw(
        self, rows: Sequence[Row], router: Router | None = None, on_preview: OnPreview | None = None
    ) -> Tensor:
        """All rows in one trajectory: images (N, C, H, W) in [-1, 1], on the CPU.

        Args:
            rows: after `fix_rows` at most so many, and the trajectory is filled up with others.
            router: default: the champion.
        """
        router, num_asked = router or self.router, len(rows)
        if self.num_rows:
            assert num_asked <= self.num_rows, "who calls has been told how many"
            rows = [*rows, *[rows[0]] * (self.num_rows - num_asked)]
        shape = (self.model.in_channels, self.model.sample_size, self.model.sample_size)
        keys = RowKeys([row.seed for row in rows], [row.index for row in rows])
        noise = torch.from_numpy(keys.start_noise(shape))
        condition = self.conditions.of([row.subject for row in rows], [row.negative_prompt for row in rows])

        def on_step(i: int, predict: Callable[[], Tensor]) -> None:
            if on_preview is not None:
                on_preview(router.plan.num_steps - i, partial(self._preview, predict))

        samples_NCHW = sample(
            self._guided(router, [row.guidance_scale for row in rows]),
            noise.to(self.device),
            condition,
            router.plan,
            reuse=router.reuse,
            rows=keys,
            on_step=on_step,
        )
        return self._decode(samples_NCHW[:num_asked])

    def _guided(self, router: Router, scales: Sequence[float | None]) -> Sampler:
        """The router's sampler, with each row's own guidance scale where any has one."""
        sampler = router.sampler
        # Guidance doubles the model's rows, whoever asks for it: in one shape it is always done, if ever.
        may_guide = router.version == UNCACHED or sampler.is_guided
        if not may_guide if self.num_rows else all(scale is None for scale in scales):
            return sampler
        default = sampler.config.guidance_scale
        filled = [default if scale is None else scale for scale in scales]
        return sampler.with_guidance(filled, always=bool(self.num_rows))

    def _preview(self, predict: Callable[[], Tensor], rows: Sequence[int]) -> Tensor:
        return self._decode(predict()[list(rows)])

    def _decode(self, samples_NCHW: Tensor) -> Tensor:
        images_NCHW = samples_NCHW if self._vae is None else decode_latents(self._vae, samples_NCHW)
        return images_NCHW.cpu()
