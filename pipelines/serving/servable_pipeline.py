"""Tell what a diffusers pipeline's requests may ask for, or refuse to serve it.

Models with branch files (DiT, PixArt, Sana) are sampled by Harmonica itself, unless their router was trained
in a pipeline.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harmonica.core.artifact import RouterArtifact
from harmonica.integrations.pipeline_folder import PipelineFolder
from harmonica.io.paths import shown
from harmonica.io.repository_files import INDEX
from harmonica.io.resolve import local_path
from harmonica.models.dit.diffusers_layout import CLASS_NAME as DIT
from harmonica.models.loading import ModelConfig
from harmonica.models.pixart.checkpoint import CLASS_NAME as PIXART
from harmonica.models.sana.checkpoint import CLASS_NAME as SANA
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
class ServablePipeline:
    """A folder's pipeline, whose call says what a request may ask for."""

    folder: PipelineFolder

    @property
    def class_name(self) -> str:
        return self.folder.class_name

    @property
    def transformer_class(self) -> str:
        return self.folder.transformers[0]

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Return the default values of the arguments of a call."""
        return self.folder.defaults

    @property
    def has_text_to_image(self) -> bool:
        """Return whether it generates without a picture."""
        from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

        kinds = AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()
        return "image" not in self.defaults or self.folder.pipeline_class in kinds

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


def servable_pipeline(config: ModelConfig, artifact: RouterArtifact | None = None) -> ServablePipeline | None:
    """Read what a model's folder says of its pipeline, without its weights.

    Args:
        artifact: the router to serve. One that was trained in a pipeline is served in the pipeline's loop,
            also where the model has a branch file.

    Returns:
        None where the model is sampled by its branch file, or is no pipeline.

    Raises:
        ValueError: it is a pipeline that is not served, or settings that it does not follow; names the
            field, the value and the cure.
    """
    folder = _pipeline_folder(config)
    is_in_pipeline = artifact is not None and _is_recorded(artifact)
    if folder is None or (_has_branch_file(folder) and not is_in_pipeline):
        return None
    check_servable(folder, config)
    return ServablePipeline(folder)


def _is_recorded(artifact: RouterArtifact) -> bool:
    from harmonica.integrations.recorded.pipelines import is_recorded  # imports Dynamo, which takes a second

    return is_recorded(artifact)


def has_two_views(config: ModelConfig) -> bool:
    """Return whether the router decides how a model is sampled.

    It does where a pipeline's transformer has a branch file.
    """
    folder = _pipeline_folder(config)
    return folder is not None and _has_branch_file(folder)


def _pipeline_folder(config: ModelConfig) -> PipelineFolder | None:
    is_pipeline = (local_path(config.path, config.revision) / INDEX).is_file()
    return PipelineFolder.read(config.path, config.revision) if is_pipeline else None


def _has_branch_file(folder: PipelineFolder) -> bool:
    transformer = next(iter(folder.transformers), "")
    return transformer in _BRANCH_FILES or (not transformer and folder.class_name in _THEIR_PIPELINES)


def check_servable(folder: PipelineFolder, config: ModelConfig) -> None:
    """Check that a pipeline is served, and under these settings.

    Raises:
        ValueError: it is not; names the field, the value and the cure.
    """
    _check_folder(folder, f"model.path is {shown(config.path)}, a {folder.class_name}")
    _check_settings(config)


def _check_folder(folder: PipelineFolder, said: str) -> None:
    if any(folder.takes(argument) for argument in _OF_VIDEOS):
        raise ValueError(f"{said}, which generates videos: this endpoint serves images, give such a pipeline")
    if not folder.transformers:
        why = "its denoiser is a UNet" if folder.has_unet else "transformer/ is missing"
        raise ValueError(f"{said} without a transformer ({why}): give a pipeline that has one")
    if not (folder.takes("prompt") and folder.takes("generator")):
        raise ValueError(f"{said}, which takes no prompt: give a text-to-image pipeline")
    for argument in _NOT_SERVED:
        if folder.takes(argument):
            raise ValueError(
                f"{said}, whose call takes {argument}, which no request has: give a text-to-image "
                "pipeline, or one that edits pictures by a prompt"
            )
    if not (folder.takes("height") and folder.takes("width")):
        raise ValueError(f"{said}, whose call takes no height and width: give another pipeline")
    if "vae" in inspect.signature(folder.pipeline_class.__init__).parameters and not folder.has_vae:
        raise ValueError(f"{said} without a VAE, which decodes its latents: give the folder with vae/")


def _check_settings(config: ModelConfig) -> None:
    cure = "leave it out: a diffusers pipeline is served as its folder has it"
    require(
        config.execution != "graphed",
        "model.execution",
        config.execution,
        "give eager or compiled: steps of a diffusers pipeline are not recorded",
    )
    require(not config.vae, "model.vae", config.vae, cure)
    require(config.text_tokens == 0, "model.text_tokens", config.text_tokens, cure)
    require(config.residual_dtype == "float32", "model.residual_dtype", config.residual_dtype, cure)
