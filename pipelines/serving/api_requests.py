"""Define the requests to the HTTP endpoint: OpenAI's Images API with extensions.

OpenAI's own client sends such fields as its `extra_body`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from harmonica.evaluation.plots import PictureFormat
from harmonica.samplers import MAX_GUIDANCE_SCALE

from .image_request import Quality
from .requests import MAX_PARTIAL_IMAGES

MAX_PROMPT_LENGTH = 4096
MAX_SEED = 2**62
_QUALITIES: dict[str | None, Quality] = {
    **{"low": "low", "medium": "medium", "high": "high"},
    **{None: "medium", "auto": "medium", "standard": "medium"},
    **{"hd": "high", "xhigh": "high", "max": "high"},
}
RequestedQuality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]


def _whole(value: Any) -> Any:
    """Turn 2.0 into 2, since pydantic's strict mode refuses such floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class GenerateRequest(BaseModel):
    """Hold the body of `POST /v1/images/generations`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(
        min_length=1,
        max_length=MAX_PROMPT_LENGTH,
        description="Text to generate from; for a class-conditional model, the name or number of a class.",
    )
    negative_prompt: str | None = Field(
        None, max_length=MAX_PROMPT_LENGTH, description="Text of what to avoid, for models that take text."
    )
    model: str | None = Field(None, description="Name of a served model. Absent: the first.")
    n: Whole | None = Field(1, ge=1, description="Number of images.")
    seed: Whole | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="The same seed gives the same images, up to rounding. Absent: random.",
    )
    size: str | None = Field(
        "auto",
        description="WIDTHxHEIGHT where the model leaves it to requests, else `auto` or the model's own.",
    )
    quality: RequestedQuality | None = Field(
        "auto",
        description="`high` (`hd`, ...) computes every branch, `medium` (`auto`, `standard`) uses the "
        "champion router, and `low` the fastest registered router.",
    )
    num_inference_steps: Whole | None = Field(
        None,
        ge=2,
        description="Number of denoising steps: one that a registered router was made for, or with `high` "
        "any that the server allows. Absent: the router's own.",
    )
    guidance_scale: float | None = Field(
        None,
        ge=1,
        le=MAX_GUIDANCE_SCALE,
        allow_inf_nan=False,
        description="Classifier-free guidance: the router's own, or with `high` any.",
    )
    timeout_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that an image may wait for its turn before it is given up with 504. The "
        "server's bound is the default and the largest.",
    )
    response_format: Literal["b64_json"] | None = "b64_json"
    output_format: PictureFormat | None = "png"
    output_compression: Whole | None = Field(
        None, ge=0, le=100, description="Quality of jpeg and webp, 100 the best and the default."
    )
    stream: bool | None = Field(False, description="Whether to answer in server-sent events.")
    partial_images: Whole | None = Field(
        None, ge=0, le=MAX_PARTIAL_IMAGES, description="With `stream`: number of previews before each image."
    )
    progress: bool | None = Field(
        False, description="With `stream`: an event a step, which OpenAI's API does not have."
    )
    user: Any = Field(None, description="Ignored, like the fields below.")
    style: Any = None
    background: Any = None
    moderation: Any = None
    complexity: Any = None
    safety_identifier: Any = None

    @property
    def served_quality(self) -> Quality:
        """Return the quality that is served for the one asked for."""
        return _QUALITIES[self.quality]

    @property
    def wants_url(self) -> bool:
        """Whether images are answered as data URLs."""
        return False


class LenientGenerateRequest(GenerateRequest):
    """Hold the same body for a server that is lenient (`serve.lenient`).

    The answer's `warnings` names every field that was not followed.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = Field(None, description="Any name: the first model generates if none has it.")
    size: str | None = Field("auto", description="Any size: the model's own is generated.")
    response_format: Literal["b64_json", "url"] | None = Field(  # type: ignore[assignment]
        "b64_json", description="`url` is answered with a data URL, which holds the picture itself."
    )

    @property
    def wants_url(self) -> bool:
        """Whether images are answered as data URLs."""
        return self.response_format == "url"


class EditRequest(GenerateRequest):
    """Hold the text fields of the form of `POST /v1/images/edits`."""

    model_config = ConfigDict(extra="forbid", strict=False)

    input_fidelity: Any = Field(None, description="Ignored.")


class LenientEditRequest(LenientGenerateRequest, EditRequest):
    """Hold the same fields for a server that is lenient."""

    model_config = ConfigDict(extra="allow", strict=False)
