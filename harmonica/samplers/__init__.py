"""What one denoising step does to x_t, with classifier-free guidance: four samplers and a folder's own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from harmonica.models.base import BranchedTransformer
from harmonica.samplers.base import Sampler, State, guide
from harmonica.samplers.config import MAX_GUIDANCE_SCALE, SamplerConfig, SamplerName
from harmonica.samplers.respaced import Ddim, Iddpm
from harmonica.validation.extras import need

__all__ = [
    "MAX_GUIDANCE_SCALE",
    "Ddim",
    "Iddpm",
    "Sampler",
    "SamplerConfig",
    "SamplerName",
    "State",
    "guide",
    "make_sampler",
    "with_scheduler",
]


def make_sampler(model: BranchedTransformer, config: SamplerConfig) -> Sampler:
    """The configured sampler of `model`.

    Raises:
        ValueError: `diffusers` without a scheduler, or with one that is not supported, or a sampler of
            another prediction than the model's.
    """
    if config.name in ("ddim", "iddpm") and model.prediction != "epsilon":
        raise ValueError(
            f"sampler.name is {config.name}, which takes predicted noise, and the model predicts "
            f"{model.prediction}: give sampler.name diffusers and the scheduler that it was trained with"
        )
    if config.name == "ddim":
        return Ddim(model, config)
    if config.name == "iddpm":
        return Iddpm(model, config)
    need("diffusers", extra="diffusers")
    from harmonica.samplers.scheduled import Scheduled  # diffusers takes a second to import

    return Scheduled(model, config)


def with_scheduler(config: SamplerConfig, scheduler: Mapping[str, Any] | None) -> SamplerConfig:
    """`config` complete in itself: `diffusers` takes the scheduler that came with the model."""
    if config.name != "diffusers" or config.scheduler is not None or scheduler is None:
        return config
    return replace(config, scheduler=dict(scheduler))
