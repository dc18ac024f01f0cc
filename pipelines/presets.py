"""Presets are functions that return a whole `WorkflowConfig`.

The command line takes them by name.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from harmonica.builtin import CAPTIONS
from harmonica.models.loading import ModelConfig
from harmonica.samplers import SamplerConfig
from harmonica.training import presets
from harmonica.training.presets import Recipe

from .config.evaluate import EvaluateConfig
from .config.pipeline import PipelineConfig
from .config.promotion import PromoteConfig
from .config.serve import ServeConfig
from .config.workflow import (
    CLASS_STAGES,
    TEXT_STAGES,
    PromptsConfig,
    TrainConfig,
    WorkflowConfig,
)


def _from_recipe(recipe: Recipe, **settings: Any) -> WorkflowConfig:
    train = TrainConfig.of(recipe.train, **settings.pop("train", {}))
    return WorkflowConfig(model=recipe.model, sampler=recipe.sampler, train=train, **settings)


def fashion() -> WorkflowConfig:
    """Return settings for the built-in DiT on Fashion-MNIST, with DDIM-20.

    A run takes minutes on two cores and downloads nothing.
    """
    return _from_recipe(
        presets.fashion(),
        evaluate=EvaluateConfig(samples=128, timing_rounds=4),
        promotion=PromoteConfig(min_psnr_to_full=38, max_frechet_to_full=0.02, min_speedup=1.2),
    )


def emoji() -> WorkflowConfig:
    """Return settings for the built-in DiT on emoji in colour, with DDIM-20.

    A run takes minutes on two cores and downloads nothing.
    """
    return _from_recipe(
        presets.emoji(),
        preset="emoji",
        registered_model="harmonica-emoji",
        evaluate=EvaluateConfig(samples=128, timing_rounds=4),
        promotion=PromoteConfig(min_psnr_to_full=35, min_speedup=1.2),
    )


def fashion_text() -> WorkflowConfig:
    """Return settings for the built-in PixArt on captions of Fashion-MNIST.

    This is text to image on two cores; nothing is downloaded.
    """
    return _from_recipe(
        presets.fashion_text(),
        preset="fashion-text",
        registered_model="harmonica-fashion-text",
        stages=TEXT_STAGES,
        prompts=PromptsConfig(path=str(CAPTIONS), max_tokens=16, dtype="float32"),
        evaluate=EvaluateConfig(samples=256, timing_rounds=4),
        promotion=PromoteConfig(min_psnr_to_full=35, min_speedup=1.2),
    )


def _on_gpus(name: str) -> WorkflowConfig:
    """Return settings for a public model on four GPUs.

    Steps are learned, or trained as in the paper.

    The model's path has to be given, and for PixArt that of the prompts.
    """
    is_text = name.startswith("pixart")
    return _from_recipe(
        presets.RECIPES[name](),
        stages=TEXT_STAGES if is_text else CLASS_STAGES,
        prompts=PromptsConfig(max_tokens=300 if "sigma" in name else 120, use_gpu=is_text),
        preset=name,
        registered_model=f"harmonica-{name}",
        train={"num_workers": 4, "use_gpu": True},
        evaluate=EvaluateConfig(samples=50_000, num_actors=4, use_gpu=True),
        serve=ServeConfig(use_gpu=True),
    )


def pipeline() -> WorkflowConfig:
    """Any text-to-image pipeline of diffusers, in its own loop.

    It wants `model.path` and `prompts.path`.
    """
    recipe = Recipe(
        model=ModelConfig(path="", dtype="bfloat16"),
        sampler=SamplerConfig(name="diffusers", num_inference_steps=28),
        train=presets.learned_steps(),
    )
    return _from_recipe(
        recipe,
        preset="pipeline",
        registered_model="harmonica-pipeline",
        stages=TEXT_STAGES,
        pipeline=PipelineConfig(enabled=True),
        train={"checkpoint_interval_s": 300},
        evaluate=EvaluateConfig(samples=64, batch_size=2, timing_rounds=2, timing_batch_size=1),
        promotion=PromoteConfig(min_psnr_to_full=20, min_speedup=1.2),
    )


_BUILTIN = {"fashion": fashion, "emoji": emoji, "fashion-text": fashion_text}
PRESETS: dict[str, Callable[[], WorkflowConfig]] = (
    _BUILTIN
    | {name: partial(_on_gpus, name) for name in presets.RECIPES if name not in _BUILTIN}
    | {"pipeline": pipeline}
)
