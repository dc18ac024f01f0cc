"""Define what generates images under plans, and choose a request's plan.

Shapes: N images, C channels, H W image.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Generic

import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.integrations.recorded.even_steps import EvenSteps
from harmonica.samplers import SamplerConfig

from .image_request import ImageRequest, Quality, SettingRejected, rejecting
from .image_sizes import SizeBounds
from .served_plan import UNCACHED, Served

_MOST_PLANS = 16
OnPreview = Callable[[int, Callable[[Sequence[int]], Tensor]], None]
"""Callback after every step: it gets the number of steps done, and a function that returns the predicted
images (N, C, H, W) of the given batch indices."""


class PlannedSampler(ABC, Generic[Served]):
    """Generates images under plans, which may change between trajectories."""

    class_names: tuple[str, ...] = ()
    """Empty where the model takes prompts."""
    sizes: SizeBounds | None = None
    """The sizes that a request may ask for; None where there is one, `image_size`."""
    has_previews = True
    """Whether intermediate images can be predicted."""
    max_pictures = 0
    """Number of pictures that a request may edit at most."""
    needs_pictures = False
    """Whether nothing is generated without a picture."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps
        self._plans: dict[Quality, Served] = {}
        self._by_steps: dict[int, Served] = {}
        self._uncached: dict[int, Served] = {}
        self._even: dict[int, Served] = {}
        self.fixed_batch_size = 0
        """Batch size that every trajectory is padded to; 0 until `fix_batch_size` is called."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Return the height and width in pixels; the width where they differ."""

    @abstractmethod
    def make_plan(self, artifact: RouterArtifact, version: str) -> Served:
        """Make the plan of a router artifact for this model.

        Raises:
            ValueError: the router was made for another model.
        """

    @abstractmethod
    def make_uncached(self, config: SamplerConfig) -> Served:
        """Make a plan that computes every branch.

        It is also the champion of a model that has no router.

        Raises:
            ValueError: the sampler does not fit the model.
        """

    @abstractmethod
    def make_even(self, config: SamplerConfig, even: EvenSteps, version: str) -> Served:
        """Make a plan of evenly spread steps, which needs no router.

        Where so few steps do not reach the speed, it is as fast as they can be. Call it from the thread that
        runs trajectories.

        Raises:
            ValueError: the sampler does not fit the model.
        """

    @abstractmethod
    def own_sampler(self, path: str) -> SamplerConfig:
        """Return how the model at a path samples where no router says it."""

    @abstractmethod
    def try_out(self, artifact: RouterArtifact, served: Served) -> None:
        """Sample under a plan before it is used, in the thread that runs trajectories.

        Raises:
            ValueError: the sample is not finite, or not the artifact's.
        """

    @abstractmethod
    def check(self, request: ImageRequest, served: Served | None = None) -> None:
        """Check a request before it is queued; any thread may call it.

        Raises:
            PromptTooLong: a prompt has more tokens than the model reads, and `over_limit` is refuse.
            SettingRejected: the model has no such setting.
        """

    @abstractmethod
    def generate(
        self,
        requests: Sequence[ImageRequest],
        served: Served | None = None,
        on_preview: OnPreview | None = None,
    ) -> Tensor:
        """Generate the images of all requests in one trajectory.

        Args:
            requests: after `fix_batch_size` no more than that; the batch is padded with copies of the first.
            served: the plan to generate under. Default: the champion's.
            on_preview: called after every step.

        Returns:
            Images (N, C, H, W) in [-1, 1], on the CPU.
        """

    def shared_with(self, request: ImageRequest, served: Served) -> Hashable:
        """Return what the requests of a batch have in common, beside the plan."""
        return None

    def warm_up(self, served: Served, size: int) -> None:
        """Compile a plan for batches of this size, in the thread that runs trajectories."""

    def probe(self) -> ImageRequest:
        """Return a request that any plan can be tried with."""
        return ImageRequest(0 if self.class_names else "", 0, 0)

    @property
    def champion(self) -> Served:
        """Return the champion router's plan."""
        assert "medium" in self._plans, "use() comes first"
        return self._plans["medium"]

    @property
    def version(self) -> str:
        """Return the version of the champion in use; "" before the first call of `use`."""
        return self.champion.version if self._plans else ""

    def padded(self, requests: Sequence[ImageRequest]) -> Sequence[ImageRequest]:
        """Return the requests with copies of the first, up to the fixed batch size."""
        if not self.fixed_batch_size:
            return requests
        assert len(requests) <= self.fixed_batch_size, "the caller has been told how many"
        return [*requests, *[requests[0]] * (self.fixed_batch_size - len(requests))]

    def fix_batch_size(self, most: int) -> int:
        """Pad every trajectory from now on to one batch size, and return that size.

        An image is then the same to the last bit whatever else is in its batch. Kernels are chosen by shape,
        so one shape always runs the same kernels. These may still treat the positions of a batch differently
        (by blocks, or by the remainder in the last block): here one image is generated at every position at
        once, and if the results differ, the size is 1. That takes two trajectories, so call it from the
        thread that runs them, once `use` has been called.

        Args:
            most: the batch size to try.
        """
        self.fixed_batch_size = most
        if most == 1:
            return 1
        request, is_same = self.probe(), True
        for quality in ("medium", "high"):
            images_NCHW = self.generate([request] * most, self.plan_for(quality))
            is_same &= all(torch.equal(image_CHW, images_NCHW[0]) for image_CHW in images_NCHW)
        self.fixed_batch_size = most if is_same else 1
        return self.fixed_batch_size

    def use(self, champion: Served, fastest: Served | None = None, by_steps: Sequence[Served] = ()) -> None:
        """Use these plans from the next request on.

        Args:
            champion: the plan of quality medium.
            fastest: the plan of quality low. Default: the champion's.
            by_steps: plans for other numbers of steps, of the requests that ask for these.
        """
        self._plans = {"medium": champion, "low": fastest or champion}
        self._by_steps = {served.config.num_inference_steps: served for served in (*by_steps, champion)}
        alone = {champion.config.num_inference_steps: champion}
        self._uncached = alone if champion.version == UNCACHED else {}
        self._even = alone if EvenSteps.named(champion.version) else {}

    def plan_for(
        self, quality: Quality, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> Served:
        """Return the plan of a quality.

        Only `high` leaves steps and guidance free, and so do evenly spread steps. For routers,
        `num_inference_steps` picks the one that was made for that number.

        Raises:
            SettingRejected: no router was made for these settings, or there is no such setting.
        """
        even = EvenSteps.named(self.champion.version)
        if quality == "high" or even is not None:
            config = self.champion.config
            if guidance_scale is not None:
                with rejecting("guidance_scale"):
                    replace(config, guidance_scale=guidance_scale)
            steps = num_inference_steps or config.num_inference_steps
            if quality == "high" or even is None:
                return self._free_plan(steps, self._uncached, self.make_uncached)
            version = self.champion.version
            return self._free_plan(steps, self._even, lambda own: self.make_even(own, even, version))
        served = self._plans[quality]
        if num_inference_steps not in (None, served.config.num_inference_steps):
            served = self._by_steps.get(num_inference_steps, served)
        asked = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        for name, value in asked.items():
            made_for = getattr(served.config, name)
            if value is not None and value != made_for:
                raise SettingRejected(
                    name,
                    f"{name} is {value} and router {served.version} of quality {quality} was made for "
                    f"{made_for}{self._other_steps(served) if name == 'num_inference_steps' else ''}: leave "
                    "it out, or give quality high, which uses no router",
                )
        return served

    def _other_steps(self, served: Served) -> str:
        """Return the words that name the other numbers of steps."""
        others = sorted(self._by_steps.keys() - {served.config.num_inference_steps})
        return f", others for {' and '.join(map(str, others))}" if others else ""

    @property
    def plans(self) -> dict[Served, tuple[Quality, ...]]:
        """Return the plans in use with the qualities they are used for.

        There is none where only `num_inference_steps` picks the plan.
        """
        uses: dict[Served, tuple[Quality, ...]] = {}
        qualities: tuple[Quality, ...] = ("high", "medium", "low")
        for quality in qualities:
            served = self.plan_for(quality)
            uses[served] = uses.get(served, ()) + (quality,)
        return uses | {served: () for served in self._by_steps.values() if served not in uses}

    def _free_plan(
        self, num_inference_steps: int, made: dict[int, Served], make: Callable[[SamplerConfig], Served]
    ) -> Served:
        """Return a plan that takes any number of steps; the last few are remembered."""
        if num_inference_steps in made:
            return made[num_inference_steps]
        config = self.champion.config
        most = max(self._max_steps, config.num_inference_steps)
        if num_inference_steps > most:
            message = f"num_inference_steps is {num_inference_steps}: give 2 to {most}"
            raise SettingRejected("num_inference_steps", message)
        with rejecting("num_inference_steps"):
            served = make(replace(config, num_inference_steps=num_inference_steps))
        if len(made) == _MOST_PLANS:
            del made[next(iter(made))]
        made[num_inference_steps] = served
        return served
