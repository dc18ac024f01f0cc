"""Make the arguments of a pipeline's call, and check requests for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from harmonica.integrations.exchanged_plans import PipelinePlan

from .image_request import ImageRequest, SettingRejected
from .pictures import decode
from .servable_pipeline import ServablePipeline
from .served_plan import UNCACHED, ServedPlan

_SET_HERE = (
    *("num_inference_steps", "height", "width", "generator", "output_type", "return_dict", "latents"),
    *("prompt", "num_images_per_prompt", "image", "callback_on_step_end"),
)
"""Arguments of a call that each batch sets itself."""


@dataclass(frozen=True, eq=False, slots=True)
class PipelineServedPlan(ServedPlan):
    """A plan of a pipeline, with its forwards and the arguments of its training."""

    forwards: PipelinePlan | None = field(default=None, kw_only=True, repr=False)
    """None computes everything."""
    arguments: Mapping[str, Any] = field(default_factory=dict, kw_only=True, repr=False)
    is_guided: bool = field(default=True, kw_only=True)
    """False where guidance needs a negative prompt, and none was trained with."""


def call_arguments(
    pipeline: ServablePipeline,
    requests: Sequence[ImageRequest],
    served: PipelineServedPlan,
    size: tuple[int, int],
) -> dict[str, Any]:
    """Return the arguments of a pipeline's call for requests that share one.

    Args:
        pipeline: says what a call of the class takes.
        size: width and height.
    """
    defaults, first = pipeline.defaults, requests[0]
    width, height = size
    call = {name: value for name, value in served.arguments.items() if name not in _SET_HERE}
    call |= {
        "num_inference_steps": served.plan.num_steps,
        "height": height,
        "width": width,
        "generator": [torch.Generator().manual_seed(each.seed + each.index) for each in requests],
        "output_type": "pt",
    }
    if "max_area" in defaults:  # FLUX Kontext scales every size to this area
        call["max_area"] = width * height
    if "use_resolution_binning" in defaults:
        call["use_resolution_binning"] = False
    if first.guidance_scale is not None:
        call[pipeline.guidance] = first.guidance_scale
    negative = call.pop("negative_prompt", None)
    is_asked = any(each.negative_prompt for each in requests) or first.guidance_scale is not None
    if pipeline.guides_by_negative_prompt and (served.is_guided or is_asked):
        negative = negative or ""
    negatives = [each.negative_prompt or negative or "" for each in requests]
    if "negative_prompt" in defaults and (negative is not None or any(negatives)):
        call["negative_prompt"] = negatives
    call["prompt"] = [each.subject for each in requests]
    if first.pictures:
        pictures = [decode(each.file) for each in first.pictures]
        call["image"] = pictures[0] if len(pictures) == 1 else pictures
        call |= {name: call[name][0] for name in ("prompt", "negative_prompt") if name in call}
        call["num_images_per_prompt"] = len(requests)
    return call


def check_request(
    pipeline: ServablePipeline, request: ImageRequest, served: PipelineServedPlan, least_side: int
) -> None:
    """Check that a pipeline takes what a request has.

    Args:
        least_side: smallest width and height of a picture to edit.

    Raises:
        SettingRejected: it does not.
    """
    name = pipeline.class_name
    if request.negative_prompt and not pipeline.takes_negative_prompts:
        raise SettingRejected(
            "negative_prompt", f"negative_prompt is set and a {name} is not guided by one: leave it out"
        )
    if request.negative_prompt and served.version != UNCACHED and not served.is_guided:
        raise SettingRejected(
            "negative_prompt",
            f"negative_prompt is set and router {served.version} was trained without: leave it out, or "
            "give quality high, which uses no router",
        )
    small = min((min(each.width, each.height) for each in request.pictures), default=1 << 30)
    if small < least_side:
        raise SettingRejected("image", f"image has a side of {small} pixels: give {least_side} or more")
    if request.guidance_scale is not None and not pipeline.guidance:
        raise SettingRejected("guidance_scale", f"guidance_scale is set and a {name} has none: leave it out")
