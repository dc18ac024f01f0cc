"""The settings of `harmonica sample`, and the objects that they ask for.

The objects are the router, the sampler, and the labels or prompts.
"""

from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from harmonica.core.artifact import RouterArtifact
from harmonica.core.plan_builders import logits_of
from harmonica.core.sampling import check_plan
from harmonica.data.class_names import UnknownClass, find_class
from harmonica.integrations.recorded.even_steps import EvenSteps
from harmonica.io.paths import shown
from harmonica.io.resolve import shipped_router
from harmonica.io.safe_load import read_released_router
from harmonica.models.loading import BUILTIN, BUILTIN_COLOUR, LoadedModel, ModelConfig
from harmonica.samplers import Sampler, SamplerConfig, SamplerName, make_sampler, with_scheduler
from harmonica.samplers.config import GuidanceChannels
from harmonica.samplers.noise import MAX_SEED, sample_label
from harmonica.validation.settings import Count, Cure, Field, SettingError, settings


@settings()
class SampleCommand:
    """Settings of one sampling."""

    router: str = ""
    """Artifact folder, .pt of the released training code, or `even-1.8x` for evenly spread steps at that
    speed, which need no training. Empty: the champion of a built-in model that has one, and no router for
    other models."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """tau of a released .pt, which does not say it."""
    classes: tuple[str, ...] = ()
    """Class names or numbers, one an image. Empty: eight drawn by seed."""
    prompts: tuple[str, ...] = ()
    """For a model that takes prompts: one an image."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED), Cure("a whole number from 0, below 2^63")] = 0
    """Fixes the noise; image i is the same whatever else is asked for."""
    sampler: SamplerName | None = None
    """Default: the router's; without one the model's own."""
    num_inference_steps: int | None = None
    """Default: the router's; without one 20."""
    guidance_scale: float | None = None
    """Default: the router's; without one 4 (built-in model: 2)."""
    guidance_channels: GuidanceChannels | None = None
    """Default: the router's; without one the convention of the model's layout."""
    allow_other_sampler: bool = False
    """Use the router under a sampler or guidance it was not trained for; its step count stays."""
    rounds: Count = 3
    """How often each way is timed, after warming up; the median counts."""
    output: Path = Path("samples.png")
    """Grid of pictures; without a VAE the latents go to a .safetensors file beside it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The denoiser."""


def own_sampler(loaded: LoadedModel, path: str) -> SamplerConfig:
    """Return the sampler of a model for which no router names one."""
    if path in (BUILTIN, BUILTIN_COLOUR):
        return SamplerConfig()
    if loaded.scheduler is not None:
        return SamplerConfig(
            name="diffusers", guidance_scale=4.0, clip_sample=False, scheduler=loaded.scheduler
        )
    return SamplerConfig(guidance_scale=4.0, guidance_channels="first_three", clip_sample=False)


def load_router(command: SampleCommand, loaded: LoadedModel) -> RouterArtifact | None:
    """Return the router asked for, by default a built-in model's champion, or None."""
    path = command.router or str(shipped_router(command.model.path) or "")
    if not path:
        return None
    if (even := EvenSteps.named(path)) is not None:
        return _untrained_router(even, requested_sampler(command, loaded, None))
    if not path.endswith(".pt"):
        return RouterArtifact.load(path)
    logits_TB = read_released_router(path)
    # The released code trains under the public code's DDIM and records neither; guidance as in its README.
    config = SamplerConfig(
        num_inference_steps=len(logits_TB),
        guidance_scale=1.5,
        guidance_channels="first_three",
        clip_sample=False,
    )
    sampler = make_sampler(loaded.model, config)
    return RouterArtifact.build(
        logits_TB, sampler, threshold=command.threshold, reuse="hold", training={"released": Path(path).name}
    )


def _untrained_router(even: EvenSteps, sampler: Sampler) -> RouterArtifact:
    """Return the artifact of evenly spread steps under a sampler."""
    model = sampler.model
    plan = even.plan(sampler.num_steps, model.macs(), is_flow_matching=model.is_flow_matching)
    correction_TJ = None if plan.correction is None else torch.tensor(plan.correction)
    return RouterArtifact.build(
        logits_of(plan, 1.0),
        sampler,
        threshold=0.5,
        reuse="forecast",
        training={"initial": "even", "chosen": "even"},
        correction_TJ=correction_TJ,
    )


def requested_sampler(command: SampleCommand, loaded: LoadedModel, router: RouterArtifact | None) -> Sampler:
    """Return the sampler asked for, checked against the router."""
    base = router.sampler if router else own_sampler(loaded, command.model.path)
    asked: dict[str, Any] = {
        "name": command.sampler,
        "num_inference_steps": command.num_inference_steps,
        "guidance_scale": command.guidance_scale,
        "guidance_channels": command.guidance_channels,
    }
    if command.sampler not in (None, "diffusers"):
        base = replace(base, name="ddim", scheduler=None)  # the name follows
    config = with_scheduler(
        replace(base, **{name: value for name, value in asked.items() if value is not None}), loaded.scheduler
    )
    if router is not None:
        router.check(loaded.model, config, allow_other_sampler=command.allow_other_sampler)
    sampler = make_sampler(loaded.model, config)
    if router is not None:
        check_plan(router.plan, sampler)
    return sampler


def _label(name: str, class_names: tuple[str, ...]) -> int:
    try:
        return find_class(name, class_names)
    except UnknownClass as error:
        raise ValueError(f"classes has {error}") from error


def requested_subjects(command: SampleCommand, loaded: LoadedModel) -> tuple[Sequence[int | str], list[str]]:
    """Return the labels or prompts asked for, and the images' titles."""
    place = shown(command.model.path)
    if not loaded.model.num_classes:
        if command.classes or not command.prompts:
            field, given = ("classes", command.classes) if command.classes else ("prompts", command.prompts)
            raise SettingError(
                f"{field} is {given!r} and the model in {place} takes prompts: give some texts with "
                "--prompts, and no classes"
            )
        return command.prompts, list(command.prompts)
    if command.prompts:
        raise SettingError(
            f"prompts is {command.prompts!r} and the model in {place} takes classes: give --classes instead"
        )
    drawn = tuple(str(sample_label(command.seed, i, loaded.model.num_classes)) for i in range(8))
    labels = [_label(name, loaded.class_names) for name in command.classes or drawn]
    return labels, [loaded.class_names[label] for label in labels]
