"""The settings of sampling, which a router's artifact records."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from harmonica.samplers.noise_schedule import NUM_TRAIN_TIMESTEPS
from harmonica.validation.settings import Field, settings

try:
    from tyro.conf import Suppress
except ModuleNotFoundError:  # sampling and training need torch, timm and safetensors, and no command line
    Suppress = None  # type: ignore[misc]

MAX_GUIDANCE_SCALE = 50.0
SamplerName = Literal["ddim", "iddpm", "dpm-solver++", "sa-solver", "diffusers"]
GuidanceChannels = Literal["first_three", "all"]


@settings("sampler")
class SamplerConfig:
    """The settings of sampling.

    A router is trained for one of them and refuses another.
    """

    name: SamplerName = "ddim"
    """The sampler. `ddim` and `iddpm` are as in the public DiT code, `dpm-solver++` and `sa-solver` as in
    diffusers; all four are for models that predict noise. `diffusers` is the scheduler that comes with the
    model's folder, also of flow matching."""
    num_inference_steps: Annotated[int, Field(ge=2, le=NUM_TRAIN_TIMESTEPS)] = 20
    """T, the number of respaced denoising steps."""
    guidance_scale: Annotated[float, Field(ge=1, le=MAX_GUIDANCE_SCALE)] = 2.0
    """Scale of classifier-free guidance; 1 runs the model once a step, without guidance."""
    guidance_channels: GuidanceChannels = "all"
    """The noise channels that are guided: three in the public DiT code, all in diffusers."""
    clip_sample: bool = True
    """Clip the predicted x_0 to [-1, 1]: for pixels, not for latents. A scheduler of `diffusers` has its own
    setting."""
    scheduler: Annotated[dict[str, Any] | None, Suppress] = None  # not a command-line option
    """The scheduler's config, for `diffusers` alone; None takes that of the model's folder."""

    def __post_init__(self) -> None:
        if self.scheduler is not None and self.name != "diffusers":
            raise ValueError(
                f"sampler.scheduler is set and sampler.name is {self.name}: give sampler.name diffusers with "
                "a scheduler's config, or leave it out"
            )

    @property
    def is_guided(self) -> bool:
        """Return whether guidance changes the prediction, which takes two rows an image."""
        return self.guidance_scale != 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as artifacts record them."""
        return asdict(self)
