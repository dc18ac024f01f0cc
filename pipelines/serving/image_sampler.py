"""Sample a batch of image requests in one trajectory, without Ray.

Shapes: N images, C channels, H W image.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.plan import Plan
from harmonica.core.sampling import check_plan, sample
from harmonica.data.conditions import make_conditions
from harmonica.data.text_encoder import OverLimit
from harmonica.execution.levels import warm_ups
from harmonica.models.loading import LoadedModel
from harmonica.models.vae import decode_latents, draws_pixels, pixels_per_latent
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.samplers.noise import SampleKeys

from .image_request import ImageRequest, Quality, SettingRejected, rejecting
from .model_check import check_is_whole
from .served_plan import UNCACHED, ServedPlan

_MAX_UNCACHED_PLANS = 16


OnPreview = Callable[[int, Callable[[Sequence[int]], Tensor]], None]
"""Callback after every step: it gets the number of steps done, and a function that returns the predicted
images (N, C, H, W) of the given batch indices."""


class ImageSampler:
    """A loaded model generates images under plans.

    The plans may be exchanged between two trajectories.
    """

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
        self._plans: dict[Quality, ServedPlan] = {}
        self.fixed_batch_size = 0
        """Batch size that every trajectory is padded to; 0 until `fix_batch_size` is called."""
        self._uncached: dict[int, ServedPlan] = {}

    @property
    def champion(self) -> ServedPlan:
        """Return the champion router's plan."""
        assert "medium" in self._plans, "use() comes first"
        return self._plans["medium"]

    @property
    def image_size(self) -> int:
        """Return the height and width of the images, in pixels."""
        return self.model.sample_size * (1 if self._vae is None else pixels_per_latent(self._vae))

    @property
    def version(self) -> str:
        """Return the version of the champion in use; "" before the first call of `use`."""
        return self.champion.version if self._plans else ""

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
        request, is_same = ImageRequest(0 if self.class_names else "", 0, 0), True
        for quality in ("medium", "high"):
            images_NCHW = self.generate([request] * most, self.plan_for(quality))
            is_same &= all(torch.equal(image_CHW, images_NCHW[0]) for image_CHW in images_NCHW)
        self.fixed_batch_size = most if is_same else 1
        return self.fixed_batch_size

    def warm_up(self, served: ServedPlan, size: int) -> None:
        """Compile a plan for batches of this size, and record its steps.

        Steps are recorded where the execution is graphed, and nothing is done where branches run eagerly.
        Call it from the thread that runs trajectories.
        """
        if self.model.execution != "eager":
            request = ImageRequest(0 if self.class_names else "", 0, 0)
            for _ in range(warm_ups(self.model)):
                self.generate([request] * (min(size, self.fixed_batch_size or size)), served)

    def make_plan(self, artifact: RouterArtifact, version: str) -> ServedPlan:
        """Make the plan of a router artifact for this model.

        Raises:
            ValueError: the router was made for another model.
        """
        artifact.check(self.model, artifact.sampler)
        sampler, plan = make_sampler(self.model, artifact.sampler), artifact.plan
        check_plan(plan, sampler)
        scores = [[round(score, 3) for score in row] for row in artifact.logits_TB.sigmoid().tolist()]
        return ServedPlan(
            sampler, plan, artifact.reuse, version, artifact.ideal_speedup, tuple(map(tuple, scores))
        )

    def make_uncached(self, config: SamplerConfig) -> ServedPlan:
        """Make a plan that computes every branch.

        It is also the champion of a model that has no router.

        Raises:
            ValueError: the sampler does not fit the model.
        """
        plan = Plan.full(config.num_inference_steps, len(self.model.branches))
        return ServedPlan(make_sampler(self.model, config), plan, "hold", UNCACHED)

    def use(self, champion: ServedPlan, fastest: ServedPlan | None = None) -> None:
        """Use these plans from the next request on.

        Args:
            champion: the plan of quality medium.
            fastest: the plan of quality low. Default: the champion's.
        """
        self._plans = {"medium": champion, "low": fastest or champion}
        is_uncached = champion.version == UNCACHED
        self._uncached = {champion.plan.num_steps: champion} if is_uncached else {}

    def plan_for(
        self, quality: Quality, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> ServedPlan:
        """Return the plan of a quality.

        Only `high` leaves a choice of steps and guidance.

        Raises:
            SettingRejected: the router was made for other settings, or there is no such setting.
        """
        if quality == "high":
            config = self.champion.sampler.config
            if guidance_scale is not None:
                with rejecting("guidance_scale"):
                    replace(config, guidance_scale=guidance_scale)
            return self._uncached_plan(num_inference_steps or config.num_inference_steps)
        served = self._plans[quality]
        asked = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        for name, value in asked.items():
            made_for = getattr(served.sampler.config, name)
            if value is not None and value != made_for:
                raise SettingRejected(
                    name,
                    f"{name} is {value} and router {served.version} of quality {quality} was made for "
                    f"{made_for}: leave it out, or give quality high, which uses no router",
                )
        return served

    def _uncached_plan(self, num_inference_steps: int) -> ServedPlan:
        made = self._uncached
        if num_inference_steps in made:
            return made[num_inference_steps]
        config = self.champion.sampler.config
        most = max(self._max_steps, config.num_inference_steps)
        if num_inference_steps > most:
            message = f"num_inference_steps is {num_inference_steps}: give 2 to {most}"
            raise SettingRejected("num_inference_steps", message)
        with rejecting("num_inference_steps"):
            served = self.make_uncached(replace(config, num_inference_steps=num_inference_steps))
        if len(made) == _MAX_UNCACHED_PLANS:
            del made[next(iter(made))]
        made[num_inference_steps] = served
        return served

    def check(self, request: ImageRequest) -> None:
        """Check a request's prompts, and embed them before its trajectory starts.

        Any thread may call it.

        Raises:
            PromptTooLong: a prompt has more tokens than the model reads, and `over_limit` is refuse.
        """
        self.conditions.check(request.subject, request.negative_prompt)

    def generate(
        self,
        requests: Sequence[ImageRequest],
        served: ServedPlan | None = None,
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
        served, num_asked = served or self.champion, len(requests)
        if self.fixed_batch_size:
            assert num_asked <= self.fixed_batch_size, "the caller has been told how many"
            requests = [*requests, *[requests[0]] * (self.fixed_batch_size - num_asked)]
        shape = (self.model.in_channels, self.model.sample_size, self.model.sample_size)
        keys = SampleKeys([request.seed for request in requests], [request.index for request in requests])
        noise = torch.from_numpy(keys.start_noise(shape))
        condition = self.conditions.of(
            [request.subject for request in requests], [request.negative_prompt for request in requests]
        )

        def on_step(i: int, predict: Callable[[], Tensor]) -> None:
            if on_preview is not None:
                on_preview(served.plan.num_steps - i, partial(self._preview, predict))

        samples_NCHW = sample(
            served.guided_sampler(
                [request.guidance_scale for request in requests], has_fixed_shape=bool(self.fixed_batch_size)
            ),
            noise.to(self.device),
            condition,
            served.plan,
            reuse=served.reuse,
            keys=keys,
            on_step=on_step,
        )
        return self._decode(samples_NCHW[:num_asked])

    def _preview(self, predict: Callable[[], Tensor], indices: Sequence[int]) -> Tensor:
        return self._decode(predict()[list(indices)])

    def _decode(self, samples_NCHW: Tensor) -> Tensor:
        images_NCHW = samples_NCHW if self._vae is None else decode_latents(self._vae, samples_NCHW)
        return images_NCHW.cpu()
