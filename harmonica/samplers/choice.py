"""Make the sampler that settings name."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from harmonica.models.base import BranchedTransformer
from harmonica.samplers.base import Sampler
from harmonica.samplers.config import SamplerConfig
from harmonica.samplers.respaced import Ddim, Iddpm
from harmonica.validation.extras import need


def make_sampler(model: BranchedTransformer, config: SamplerConfig) -> Sampler:
    """Return the configured sampler of `model`.

    Raises:
        ValueError: the scheduler of `diffusers` is missing or not supported, or the sampler takes another
            prediction than the model's.
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
    """Return `config` with the model's scheduler where it names none.

    This concerns the sampler `diffusers` alone.
    """
    if config.name != "diffusers" or config.scheduler is not None or scheduler is None:
        return config
    return replace(config, scheduler=dict(scheduler))
