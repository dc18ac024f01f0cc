"""Check that a router can be trained in a pipeline, before it is loaded."""

from collections.abc import Mapping
from typing import Any

from harmonica.integrations.pipeline_folder import PipelineFolder
from harmonica.integrations.recorded.kinds import DECLARATIONS
from harmonica.validation.settings import SettingError

_NOT_FOR_IMAGES = ("num_frames", "video", "audio_end_in_s", "lyrics")
_OF_AN_IMAGE = ("strength", "mask_image", "control_image", "class_labels")


def check_trainable(folder: PipelineFolder, call: Mapping[str, Any]) -> None:
    """Check that a router can be trained in a folder's pipeline.

    Args:
        call: the arguments that its calls are given, with their values.

    Raises:
        ValueError: the pipeline has no transformer, a refused one, or draws no images from prompts.
        SettingError: its call does not take an argument.
    """
    words = f"model.path {folder.path} is a {folder.class_name}"
    if not folder.transformers:
        raise ValueError(
            f"{words}, which has no transformer{': its denoiser is a UNet' if folder.has_unet else ''}; give "
            "a pipeline with pipe.transformer"
        )
    for denoiser in folder.transformers:
        if (known := DECLARATIONS.get(denoiser)) is not None and known.refused:
            raise ValueError(f"{words} with a {denoiser}, which has no plan: {known.refused}")
    if other := next((name for name in _NOT_FOR_IMAGES if folder.takes(name)), None):
        raise ValueError(
            f"{words}, whose call takes {other}: it does not draw single images, which are judged here; "
            "train it by harmonica.train_pipeline"
        )
    is_of_an_image = any(folder.takes(name) for name in _OF_AN_IMAGE)
    if is_of_an_image or not (folder.takes("prompt") and folder.takes("output_type")):
        raise ValueError(
            f"{words}, which does not draw images from prompts alone: give a text-to-image pipeline, or "
            "train by harmonica.train_pipeline"
        )
    for name, value in call.items():
        if not folder.takes(name):
            raise SettingError(
                f"pipeline.{name} is {value}, and {words}, whose call does not take it: leave it out"
            )
