"""Refuse settings without a counterpart in the loop of a diffusers pipeline."""

from typing import Any

from harmonica.models.loading import ModelConfig
from harmonica.samplers import SamplerConfig
from harmonica.validation.settings import SettingError

from .config.workflow import PromptsConfig, Stage, WorkflowConfig

_STAGES: tuple[Stage, ...] = ("sweep", "compare")


def refuse_settings(config: WorkflowConfig) -> None:
    """Refuse what training and evaluation in a pipeline do not do.

    Raises:
        SettingError: names the setting, its value and what to give instead.
    """
    for stage in _STAGES:
        if stage in config.stages:
            raise SettingError(
                f"stages is {config.stages}, and {stage} knows models with a branch file alone: leave it out"
            )
    if config.sampler.name != "diffusers":
        raise SettingError(
            f"sampler.name is {config.sampler.name}, and a pipeline samples with its own scheduler: give "
            "diffusers"
        )
    for name, value, usual, cure in _without_counterpart(config):
        if value != usual:
            raise SettingError(f"{name} is {value}, which a pipeline's call does not know: {cure}")
    from harmonica.pipeline_training.sampling import check_seed  # they take seconds, so not at the top
    from harmonica.pipeline_training.trainer import check_settings

    check_settings(config.train)
    check_seed(config.seed)


def _without_counterpart(config: WorkflowConfig) -> list[tuple[str, Any, Any, str]]:
    """Return such settings: value, the value that says nothing, and the cure."""
    model, sampler, prompts = ModelConfig(), SamplerConfig(), PromptsConfig()
    cures = {
        "guidance_scale": "give pipeline.guidance_scale",
        "cacheable": "give pipeline.cacheable",
        "max_tokens": "give pipeline.max_sequence_length",
        "text_tokens": "give pipeline.max_sequence_length",
    }
    usual = {
        "model": (config.model, model, ("shape", "vae", "text_tokens", "cacheable", "residual_dtype")),
        "sampler": (config.sampler, sampler, ("guidance_scale", "guidance_channels", "clip_sample")),
        "prompts": (config.prompts, prompts, ("max_tokens", "over_limit")),
    }
    found = [
        (f"{section}.{name}", getattr(given, name), getattr(plain, name), cures.get(name, "leave it out"))
        for section, (given, plain, names) in usual.items()
        for name in names
    ]
    evaluate = config.evaluate
    found += [
        (f"evaluate.{name}", getattr(evaluate, name), (), "leave it out")
        for name in ("transfer", "transfer_guidance", "transfer_steps")
    ]
    execution = config.model.execution
    return [*found, ("model.execution", execution if execution != "eager" else "auto", "auto", "give eager")]
