"""Sample a batch of requests in one call of a diffusers pipeline, without Ray.

Shapes: N images, C channels, H W image.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.plan import Plan
from harmonica.integrations.exchanged_plans import ExchangedPlans, PipelinePlan
from harmonica.integrations.recorded.even_steps import EvenSteps, is_flow_matching
from harmonica.models.loading import ModelConfig
from harmonica.samplers import MAX_GUIDANCE_SCALE, SamplerConfig

from .image_request import ImageRequest
from .image_sizes import SizeBounds, pipeline_bounds
from .pictures import plain_picture
from .pipeline_call import PipelineServedPlan, call_arguments, check_request
from .pipeline_previews import LatentDecoder, WatchedSteps
from .planned_sampler import OnPreview, PlannedSampler
from .prompt_logs import keep_words_out
from .servable_pipeline import ServablePipeline
from .served_plan import UNCACHED

_PROBE_SIDE = 256


class PipelineSampler(PlannedSampler[PipelineServedPlan]):
    """A diffusers pipeline generates images in its own loop.

    Each image has a generator of its own: image i of seed s is diffusers' image of a generator on the CPU
    with seed s + i, up to rounding, whatever is in its batch.
    """

    has_previews = False
    """Known once an image was made."""

    def __init__(
        self,
        pipeline: ServablePipeline,
        config: ModelConfig,
        device: str = "cpu",
        *,
        max_steps: int = 100,
        max_pixels: int = 2**22,
    ) -> None:
        """Load the pipeline.

        Args:
            max_steps: largest number of steps of an image without a router.
            max_pixels: largest area of an image; the pipeline's own size is always allowed.
        """
        super().__init__(max_steps)
        self.pipeline = pipeline
        self.pipe = pipeline.folder.load(dtype=getattr(torch, config.dtype), device=device)
        keep_words_out(self.pipe)
        self._is_compiled = config.execution_on("cpu") == "compiled"  # `auto` is eager on any device
        self._exchanged = ExchangedPlans(self.pipe, is_compiled=self._is_compiled)
        self._spread: tuple[EvenSteps, PipelinePlan] | None = None
        self._decoder = LatentDecoder(self.pipe)
        self.max_pictures, self.needs_pictures = pipeline.max_pictures, pipeline.needs_pictures
        self._max_pixels = max_pixels
        self.sizes: SizeBounds = self._bounds({})

    def _bounds(self, arguments: Mapping[str, Any]) -> SizeBounds:
        """Return the sizes of requests; that of the champion's training is the default."""
        return pipeline_bounds(self.pipe, self.pipeline.defaults, arguments, self._max_pixels)

    @property
    def image_size(self) -> int:
        """Return the width of images whose request asks for no size, in pixels."""
        return self.sizes.default[0]

    def use(
        self,
        champion: PipelineServedPlan,
        fastest: PipelineServedPlan | None = None,
        by_steps: Sequence[PipelineServedPlan] = (),
    ) -> None:
        """Use these plans, and the champion's size, from the next request on."""
        self.sizes = self._bounds(champion.arguments)
        super().use(champion, fastest, by_steps)

    def fix_batch_size(self, most: int) -> int:
        """Pad every call from now on to one batch size, and return that size."""
        return super().fix_batch_size(1 if self.pipeline.makes_one_image else most)

    def make_plan(self, artifact: RouterArtifact, version: str) -> PipelineServedPlan:
        """Make the plan of a router that was trained in a pipeline.

        Raises:
            ValueError: the router was made for another class, for other weights or in no pipeline.
        """
        call = artifact.training.get("call", {})
        arguments = {
            name: value for name, value in call.get("arguments", {}).items() if name in self.pipeline.defaults
        }
        named = {*arguments, *call.get("prompt_arguments", ())}
        has_negative = any(name.startswith("negative_prompt") for name in named)
        is_guided = has_negative or not self.pipeline.guides_by_negative_prompt
        scale = self._guidance_scale(arguments) if is_guided else 1.0
        scores = [[round(score, 3) for score in row] for row in artifact.logits_TB.sigmoid().tolist()]
        return PipelineServedPlan(
            replace(artifact.sampler, guidance_scale=scale),
            artifact.plan,
            artifact.reuse,
            version,
            artifact.ideal_speedup,
            tuple(map(tuple, scores)),
            forwards=self._exchanged.make(artifact),
            arguments=arguments,
            is_guided=is_guided,
        )

    def make_uncached(self, config: SamplerConfig) -> PipelineServedPlan:
        """Make a plan that computes everything, for calls with the champion's arguments."""
        champion = self._plans.get("medium")
        if champion is None:
            self._exchanged.compile_blocks()
        branches = len(champion.plan.compute[0]) if champion else 1
        return PipelineServedPlan(
            config,
            Plan.full(config.num_inference_steps, branches),
            "hold",
            UNCACHED,
            arguments=champion.arguments if champion else {},
            is_guided=champion.is_guided if champion else True,
        )

    def make_even(self, config: SamplerConfig, even: EvenSteps, version: str) -> PipelineServedPlan:
        """Make a plan of evenly spread steps.

        The first one generates a small image, which records what the transformer's blocks cost.
        """
        if self._spread is None or self._spread[0] != even:
            forwards = self._exchanged.make_even(even)
            every = Plan.full(config.num_inference_steps, 1)
            unknown = PipelineServedPlan(config, every, "forecast", version, forwards=forwards)
            self.generate([self.probe()], unknown)
            self._spread = even, forwards
        _, forwards = self._spread
        macs, is_flow = forwards[0].trajectory.views[0].macs(), is_flow_matching(self.pipe.scheduler)
        plan = even.nearest_plan(config.num_inference_steps, macs, is_flow_matching=is_flow)
        speedup = plan.ideal_speedup(macs)
        return PipelineServedPlan(config, plan, "forecast", version, speedup, forwards=forwards)

    def own_sampler(self, path: str) -> SamplerConfig:
        """Return the settings that the pipeline's call has by default."""
        return SamplerConfig(
            name="diffusers",
            num_inference_steps=int(self.pipeline.defaults.get("num_inference_steps") or 50),
            guidance_scale=self._guidance_scale({}),
            scheduler=json.loads(self.pipe.scheduler.to_json_string()),
        )

    def _guidance_scale(self, arguments: Mapping[str, Any]) -> float:
        name = self.pipeline.guidance
        scale = arguments.get(name, self.pipeline.defaults.get(name)) if name else 1.0
        return min(max(float(scale or 1.0), 1.0), MAX_GUIDANCE_SCALE)

    def try_out(self, artifact: RouterArtifact, served: PipelineServedPlan) -> None:
        """Generate a small image under a plan, which records the transformer's forward.

        Raises:
            ValueError: the router was made for other branches or steps, or the image is not finite.
        """
        if not self.generate([self.probe()], served).isfinite().all():
            raise ValueError("the router's sample is not finite: the weights or the router are damaged")

    def warm_up(self, served: PipelineServedPlan, size: int) -> None:
        """Compile a plan for batches of this size.

        It is known afterwards whether there are previews.
        """
        if self._is_compiled:
            request = replace(self.probe(), size=self._bounds(served.arguments).default)
            self.generate([request] * min(size, self.fixed_batch_size or size), served)
        elif self._decoder.works is None:
            self.generate([self.probe()], served)

    def probe(self) -> ImageRequest:
        """Return a request for a small image."""
        width, height = self.sizes.default
        side = max(self.sizes.multiple, _PROBE_SIDE // self.sizes.multiple * self.sizes.multiple)
        pictures = (plain_picture(side, side),) if self.needs_pictures else ()
        return ImageRequest("a photo", 0, 0, size=(min(side, width), min(side, height)), pictures=pictures)

    def check(self, request: ImageRequest, served: PipelineServedPlan | None = None) -> None:
        """Check that the pipeline takes what a request has.

        Raises:
            SettingRejected: it does not.
        """
        check_request(self.pipeline, request, served or self.champion, self.sizes.multiple)

    def size_of(self, request: ImageRequest) -> tuple[int, int]:
        """Return the width and height of a request's image.

        A picture's shape is kept by default.
        """
        if request.size is not None:
            return request.size
        if request.pictures:
            return self.sizes.like(request.pictures[0].width, request.pictures[0].height)
        return self.sizes.default

    def shared_with(self, request: ImageRequest, served: PipelineServedPlan) -> Hashable:
        """Return what one call of the pipeline has for all its images.

        Pipelines differ in what several pictures or several prompts with pictures mean to them: images of one
        picture and prompt are made together, by `num_images_per_prompt`.
        """
        shared: tuple[Hashable, ...] = (
            self.size_of(request),
            request.guidance_scale,
            bool(request.negative_prompt),
        )
        if self.pipeline.makes_one_image:
            return (*shared, request)
        if not request.pictures:
            return shared
        return (*shared, request.subject, request.negative_prompt, request.pictures)

    def generate(
        self,
        requests: Sequence[ImageRequest],
        served: PipelineServedPlan | None = None,
        on_preview: OnPreview | None = None,
    ) -> Tensor:
        """Generate the images of all requests in one call.

        They share what `shared_with` returns.

        Args:
            requests: after `fix_batch_size` no more than that; the batch is padded with copies of the first.
            served: the plan to generate under. Default: the champion's.
            on_preview: called after every step.

        Returns:
            Images (N, C, H, W) in [-1, 1], on the CPU.

        Raises:
            ValueError: the pipeline refuses its arguments, or makes another size.
        """
        served, size = served or self.champion, self.size_of(requests[0])
        call = call_arguments(self.pipeline, self.padded(requests), served, size)

        def on_step(step: int, clean: Tensor) -> None:
            if on_preview is not None:
                on_preview(step, lambda indices: self._decoder.decode(clean[list(indices)], size))

        steps = WatchedSteps(on_step)
        with self._exchanged.under(served.forwards), steps.of(self.pipe.scheduler), torch.no_grad():
            images = self.pipe(**call, return_dict=False)[0]
        images_NCHW: Tensor = images.float().cpu() * 2 - 1
        if images_NCHW.shape[2:] != (call["height"], call["width"]):
            height, width = images_NCHW.shape[2:]
            raise ValueError(
                f"{self.pipeline.class_name} made {width}x{height} of {call['width']}x{call['height']}"
            )
        self._decoder.check(steps.latents, images_NCHW, size)
        self.has_previews = bool(self._decoder.works)
        return images_NCHW[: len(requests)]
