"""Sample a batch of image requests in one trajectory, without Ray.

Shapes: N images, C channels, H W image.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from harmonica.cli.sample_command import own_sampler
from harmonica.core.artifact import RouterArtifact
from harmonica.core.golden_sample import check_sample
from harmonica.core.plan import Plan
from harmonica.core.sampling import check_plan, sample
from harmonica.data.conditions import make_conditions
from harmonica.data.text_encoder import OverLimit
from harmonica.execution.levels import warm_ups
from harmonica.integrations.recorded.even_steps import EvenSteps
from harmonica.models.loading import LoadedModel
from harmonica.models.vae import decode_latents, draws_pixels, pixels_per_latent
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.samplers.noise import SampleKeys

from .image_request import ImageRequest
from .model_check import check_is_whole
from .planned_sampler import OnPreview, PlannedSampler
from .served_plan import UNCACHED, SamplerPlan


class ImageSampler(PlannedSampler[SamplerPlan]):
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
        super().__init__(max_steps)
        check_is_whole(loaded)
        self.loaded = loaded
        self.model, self.class_names = loaded.model.to(device), loaded.class_names
        self.device = device
        self._vae = None if draws_pixels(self.model) else loaded.load_vae(device)
        self.conditions = make_conditions(loaded, device, over_limit=over_limit)

    @property
    def image_size(self) -> int:
        """Return the height and width of the images, in pixels."""
        return self.model.sample_size * (1 if self._vae is None else pixels_per_latent(self._vae))

    def warm_up(self, served: SamplerPlan, size: int) -> None:
        """Compile a plan for batches of this size, and record its steps.

        Steps are recorded where the execution is graphed, and nothing is done where branches run eagerly.
        Call it from the thread that runs trajectories.
        """
        if self.model.execution != "eager":
            request = self.probe()
            for _ in range(warm_ups(self.model)):
                self.generate([request] * (min(size, self.fixed_batch_size or size)), served)

    def make_plan(self, artifact: RouterArtifact, version: str) -> SamplerPlan:
        """Make the plan of a router artifact for this model.

        Raises:
            ValueError: the router was made for another model.
        """
        artifact.check(self.model, artifact.sampler)
        sampler, plan = make_sampler(self.model, artifact.sampler), artifact.plan
        check_plan(plan, sampler)
        scores = [[round(score, 3) for score in row] for row in artifact.logits_TB.sigmoid().tolist()]
        return SamplerPlan(
            artifact.sampler,
            plan,
            artifact.reuse,
            version,
            artifact.ideal_speedup,
            tuple(map(tuple, scores)),
            sampler=sampler,
        )

    def make_uncached(self, config: SamplerConfig) -> SamplerPlan:
        """Make a plan that computes every branch.

        It is also the champion of a model that has no router.

        Raises:
            ValueError: the sampler does not fit the model.
        """
        plan = Plan.full(config.num_inference_steps, len(self.model.branches))
        sampler = make_sampler(self.model, config)
        return SamplerPlan(sampler.config, plan, "hold", UNCACHED, sampler=sampler)

    def make_even(self, config: SamplerConfig, even: EvenSteps, version: str) -> SamplerPlan:
        """Make a plan of evenly spread steps.

        Raises:
            ValueError: the sampler does not fit the model.
        """
        sampler, macs = make_sampler(self.model, config), self.model.macs()
        is_flow = self.model.is_flow_matching
        plan = even.nearest_plan(config.num_inference_steps, macs, is_flow_matching=is_flow)
        return SamplerPlan(
            sampler.config, plan, "forecast", version, plan.ideal_speedup(macs), sampler=sampler
        )

    def own_sampler(self, path: str) -> SamplerConfig:
        """Return how the model at a path samples where no router says it."""
        return own_sampler(self.loaded, path)

    def try_out(self, artifact: RouterArtifact, served: SamplerPlan) -> None:
        """Check that a router's sample is reproduced here.

        Raises:
            ValueError: it is not.
        """
        check_sample(artifact, served.sampler)

    def check(self, request: ImageRequest, served: SamplerPlan | None = None) -> None:
        """Check a request's prompts, and embed them before its trajectory starts.

        Any thread may call it.

        Raises:
            PromptTooLong: a prompt has more tokens than the model reads, and `over_limit` is refuse.
        """
        assert not request.pictures, "refused before it is sent here"
        self.conditions.check(request.subject, request.negative_prompt)

    def generate(
        self,
        requests: Sequence[ImageRequest],
        served: SamplerPlan | None = None,
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
        requests = self.padded(requests)
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
