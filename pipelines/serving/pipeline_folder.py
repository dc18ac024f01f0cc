"""Load a diffusers pipeline that is served by its own loop, or refuse it.

Models with branch files (DiT, PixArt, Sana) are sampled by Harmonica itself, and are not found here.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harmonica.io.repository_files import INDEX
from harmonica.io.resolve import local_path
from harmonica.io.weight_files import read_json
from harmonica.models.diffusers_folder import find_transformer
from harmonica.models.dit.diffusers_layout import CLASS_NAME as DIT
from harmonica.models.loading import ModelConfig
from harmonica.models.pixart.checkpoint import CLASS_NAME as PIXART
from harmonica.models.sana.checkpoint import CLASS_NAME as SANA
from harmonica.torchvision_ops import ensure_torchvision_imports
from harmonica.validation.settings import require

_BRANCH_FILES = (DIT, PIXART, SANA)
_THEIR_PIPELINES = ("DiTPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline")
_NOT_SERVED = ("mask_image", "control_image", "layers", "image_reference", "images")
# Arguments of calls that make videos, whose names differ from one pipeline to the next.
_OF_VIDEOS = ("num_frames", "num_videos_per_prompt", "video_length", "frames", "video")
# A list is several pictures for one image to them, and a batch to other classes.
_SEVERAL_PICTURES = ("QwenImageEditPlusPipeline", "Flux2Pipeline", "Flux2KleinPipeline")
# Guided, they have two timesteps, or one empty negative prompt, whatever the number of images.
_ONE_IMAGE_A_CALL = ("PRXPipeline", "LongCatImagePipeline")
_MAX_PICTURES = 4
_NO_VALUE = (None, inspect.Parameter.empty)


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline's folder says its class, whose call says what a request may ask for."""

    path: Path
    class_name: str
    transformer_class: str
    defaults: Mapping[str, Any]
    """Default values of the arguments of a call."""
    has_text_to_image: bool
    """Whether it generates without a picture."""

    @property
    def max_pictures(self) -> int:
        """Return how many pictures a call edits at most."""
        if "image" not in self.defaults:
            return 0
        return _MAX_PICTURES if self.class_name in _SEVERAL_PICTURES else 1

    @property
    def makes_one_image(self) -> bool:
        """Return whether a call makes one image and no more."""
        return self.class_name in _ONE_IMAGE_A_CALL

    @property
    def needs_pictures(self) -> bool:
        """Return whether no call does without a picture."""
        return self.max_pictures > 0 and not self.has_text_to_image

    @property
    def guidance(self) -> str:
        """Return the argument that a request's `guidance_scale` stands for; "" for none."""
        own = self.defaults.get("guidance_scale")
        if own in _NO_VALUE and "true_cfg_scale" in self.defaults:
            return "true_cfg_scale"
        return "" if own in _NO_VALUE else "guidance_scale"

    @property
    def guides_by_negative_prompt(self) -> bool:
        """Return whether a call is guided only if it is given a negative prompt."""
        return self.guidance == "true_cfg_scale"

    @property
    def takes_negative_prompts(self) -> bool:
        """Return whether a negative prompt has an effect under the default settings."""
        # FLUX takes one, and does not look at it while true_cfg_scale is 1.
        is_looked_at = self.guidance == "true_cfg_scale" or self.defaults.get("true_cfg_scale") is None
        return "negative_prompt" in self.defaults and is_looked_at

    def load(self, config: ModelConfig, device: str) -> Any:
        """Load the pipeline, frozen, onto a device.

        Raises:
            ValueError: files of it are missing or damaged.
        """
        pipe = _class(self.class_name).from_pretrained(
            self.path, torch_dtype=getattr(torch, config.dtype), local_files_only=True, use_safetensors=True
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)


def pipeline_folder(config: ModelConfig) -> PipelineFolder | None:
    """Read what a model's folder says of its pipeline, without its weights.

    Returns:
        None where the model has a branch file, or is no pipeline.

    Raises:
        ValueError: it is a pipeline that is not served, or settings that it does not follow; names the
            field, the value and the cure.
    """
    folder = local_path(config.path, config.revision)
    if not folder.is_dir() or not (folder / INDEX).is_file():
        return None
    found = find_transformer(folder)
    transformer = str(read_json(found / "config.json").get("_class_name", "")) if found else ""
    name = str(read_json(folder / INDEX).get("_class_name", ""))
    if transformer in _BRANCH_FILES or (not transformer and name in _THEIR_PIPELINES):
        return None
    kind, said = _class(name), f"model.path is {config.path}, a {name}"
    defaults = {
        argument: parameter.default
        for argument, parameter in inspect.signature(kind.__call__).parameters.items()
    }
    if any(argument in defaults for argument in _OF_VIDEOS):
        raise ValueError(f"{said}, which generates videos: this endpoint serves images, give such a pipeline")
    if found is None:
        why = "its denoiser is a UNet" if (folder / "unet").is_dir() else "transformer/ is missing"
        raise ValueError(f"{said} without a transformer ({why}): give a pipeline that has one")
    if "prompt" not in defaults or "generator" not in defaults:
        raise ValueError(f"{said}, which takes no prompt: give a text-to-image pipeline")
    for argument in _NOT_SERVED:
        if argument in defaults:
            raise ValueError(
                f"{said}, whose call takes {argument}, which no request has: give a text-to-image "
                "pipeline, or one that edits pictures by a prompt"
            )
    if not {"height", "width"} <= defaults.keys():
        raise ValueError(f"{said}, whose call takes no height and width: give another pipeline")
    _check_settings(config)
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    is_text_to_image = "image" not in defaults or kind in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()
    return PipelineFolder(folder, name, transformer, defaults, is_text_to_image)


def _class(name: str) -> Any:
    ensure_torchvision_imports()
    import diffusers

    kind = getattr(diffusers, name, None) if name.isidentifier() else None
    if kind is None or not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
        raise ValueError(
            f"model.path is the folder of a {name!r}, which diffusers {diffusers.__version__} does not have: "
            "install the version that wrote it"
        )
    return kind


def _check_settings(config: ModelConfig) -> None:
    cure = "leave it out: a diffusers pipeline is served as its folder has it"
    require(config.execution in ("auto", "eager"), "model.execution", config.execution, cure)
    require(not config.vae, "model.vae", config.vae, cure)
    require(config.text_tokens == 0, "model.text_tokens", config.text_tokens, cure)
    require(config.residual_dtype == "float32", "model.residual_dtype", config.residual_dtype, cure)
