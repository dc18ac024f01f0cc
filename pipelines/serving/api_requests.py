"""What the HTTP endpoint is asked: OpenAI's Images API with extensions, which its client hands through."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from harmonica.evaluation.plots import PictureFormat
from harmonica.samplers import MAX_GUIDANCE_SCALE
from pipelines.serving.image_sampler import Quality
from pipelines.serving.requests import MAX_PARTIAL_IMAGES

MAX_PROMPT_LENGTH = 4096
MAX_SEED = 2**62
_QUALITIES: dict[str | None, Quality] = {
    **{"low": "low", "medium": "medium", "high": "high"},
    **{None: "medium", "auto": "medium", "standard": "medium"},
    **{"hd": "high", "xhigh": "high", "max": "high"},
}
RequestedQuality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]


def _whole(value: Any) -> Any:
    """JSON has no integers, so 2.0 is one; pydantic's strict mode disagrees."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class GenerateRequest(BaseModel):
    """Body of `POST /v1/images/generations`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(
        min_length=1,
        max_length=MAX_PROMPT_LENGTH,
        description="What to draw; of a class-conditional model, a class name or number.",
    )
    negative_prompt: str | None = Field(
        None, max_length=MAX_PROMPT_LENGTH, description="What not to draw, for models that take text."
    )
    model: str | None = Field(None, description="The served model, or nothing.")
    n: Whole | None = Field(1, ge=1, description="Number of images.")
    seed: Whole | None = Field(
        None, ge=0, le=MAX_SEED, description="Same seed, same images, up to rounding. Absent: random."
    )
    size: str | None = Field("auto", description="`auto`, or the model's own size.")
    quality: RequestedQuality | None = Field(
        "auto",
        description="`high` (`hd`, ...) computes everything, `medium` (`auto`, `standard`) is the champion "
        "router's, `low` the fastest registered router's.",
    )
    num_inference_steps: Whole | None = Field(
        None,
        ge=2,
        description="Denoising steps: the router's own, or with `high` any that the server allows.",
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
        description="Seconds that an image may wait for its turn, or be given up with 504. Default, and at "
        "most: the server's bound.",
    )
    response_format: Literal["b64_json"] | None = "b64_json"
    output_format: PictureFormat | None = "png"
    output_compression: Whole | None = Field(
        None, ge=0, le=100, description="Quality of jpeg and webp, 100 the best and the default."
    )
    stream: bool | None = Field(False, description="Answer in server-sent events.")
    partial_images: Whole | None = Field(
        None, ge=0, le=MAX_PARTIAL_IMAGES, description="With `stream`: previews before each image."
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
        return _QUALITIES[self.quality]

    @property
    def wants_url(self) -> bool:
        return False


class LenientGenerateRequest(GenerateRequest):
    """The same where the server is lenient (`serve.lenient`).

    The answer's `warnings` names every field that was not followed.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = Field(None, description="Any: the served model draws.")
    size: str | None = Field("auto", description="Any: the model's own size is drawn.")
    response_format: Literal["b64_json", "url"] | None = Field(  # type: ignore[assignment]
        "b64_json", description="`url` is answered with a data URL, which holds the picture itself."
    )

    @property
    def wants_url(self) -> bool:
        return self.response_format == "url"
