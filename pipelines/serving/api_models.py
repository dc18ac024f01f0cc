"""Bodies of the HTTP endpoint: OpenAI's Images API with extensions, which its own client hands through."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from harmonica.pictures import PictureFormat
from harmonica.samplers import MAX_GUIDANCE_SCALE
from pipelines.serving.drawing import Quality
from pipelines.serving.orders import MAX_PARTIAL_IMAGES

MAX_PROMPT_LENGTH = 4096
MAX_SEED = 2**62
_QUALITIES: dict[str | None, Quality] = {
    **{"low": "low", "medium": "medium", "high": "high"},
    **{None: "medium", "auto": "medium", "standard": "medium"},
    **{"hd": "high", "xhigh": "high", "max": "high"},
}
AskedQuality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]


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
    seed: Whole | None = Field(None, ge=0, le=MAX_SEED, description="Same seed, same images. Absent: random.")
    size: str | None = Field("auto", description="`auto`, or the model's own size.")
    quality: AskedQuality | None = Field(
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
    def drawn_quality(self) -> Quality:
        return _QUALITIES[self.quality]

    @property
    def wants_url(self) -> bool:
        return False


class LenientGenerateRequest(GenerateRequest):
    """The same where the server is lenient (`serve.lenient`): the answer's `warnings` names every field that
    was not followed."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = Field(None, description="Any: the served model draws.")
    size: str | None = Field("auto", description="Any: the model's own size is drawn.")
    response_format: Literal["b64_json", "url"] | None = Field(  # type: ignore[assignment]
        "b64_json", description="`url` is answered with a data URL, which holds the picture itself."
    )

    @property
    def wants_url(self) -> bool:
        return self.response_format == "url"


class Warned(BaseModel):
    """A field of the request that was not followed."""

    param: str
    message: str


class ImageData(BaseModel):
    """One image: `b64_json`, or `url` where that was asked for."""

    b64_json: str | None = None
    url: str | None = Field(default=None, description="A data URL, of a server that is lenient.")
    revised_prompt: str = Field(description="The class's own name, or the prompt as it was.")


class Making(BaseModel):
    """How images came about."""

    seed: int
    router_version: str = Field(description="`uncached` where every branch was computed.")
    cur: float = Field(description="Cache utilisation ratio: the share of branches that were reused.")
    num_inference_steps: int
    guidance_scale: float
    batch_size: int = Field(description="Images that shared the trajectory, other requests' among them.")
    inference_time_s: float = Field(
        description="Of the trajectory; of the longest, where the images took several."
    )


class GenerateResponse(Making):
    """OpenAI's `ImagesResponse`, and how the images came about."""

    created: int
    data: list[ImageData]
    output_format: PictureFormat
    quality: Quality
    size: str
    warnings: list[Warned] = Field(description="What was not followed, by a server that is lenient.")


class _TokenDetails(BaseModel):
    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """OpenAI's count of tokens: these models have none."""

    input_tokens: int = 0
    input_tokens_details: _TokenDetails = Field(default_factory=_TokenDetails)
    output_tokens: int = 0
    total_tokens: int = 0


class _Event(BaseModel):
    created_at: int
    index: int = Field(description="Number of the image within the request.")


class _PictureEvent(_Event):
    b64_json: str
    background: Literal["opaque"] = "opaque"
    output_format: PictureFormat
    quality: Quality
    size: str


class PartialImageEvent(_PictureEvent):
    """The image that a step points at: OpenAI's `ImageGenPartialImageEvent`."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int
    step: int = Field(description="Steps done.")
    num_inference_steps: int


class CompletedEvent(_PictureEvent, Making):
    """A finished image: OpenAI's `ImageGenCompletedEvent`."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    revised_prompt: str
    warnings: list[Warned] = Field(description="What was not followed, by a server that is lenient.")
    usage: Usage = Field(default_factory=Usage)


class ProgressEvent(_Event):
    """A step done; sent where `progress` is set."""

    type: Literal["image_generation.progress"] = "image_generation.progress"
    step: int
    num_inference_steps: int


class Model(BaseModel):
    """OpenAI's `Model`, and what it draws."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "harmonica"
    size: str
    class_names: list[str] = Field(description="Empty where the model takes text.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class RouterEntry(BaseModel):
    """A router that is served, its plan row by row: row 0 is the last step to run."""

    id: str = Field(description="Its version.")
    object: Literal["router"] = "router"
    quality: list[Quality] = Field(description="What it is used for.")
    cur: float
    ideal_speedup: float
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    plan: list[str] = Field(description="A string of 0 (reused) and 1 (computed) a step.")
    scores: list[list[float]] = Field(description="Of the same shape; empty of `uncached`.")


class RouterList(BaseModel):
    object: Literal["list"] = "list"
    data: list[RouterEntry]


class RefusedRouter(BaseModel):
    """The registry's champion, where it cannot be served and the one before still is."""

    version: str
    reason: str


class Health(BaseModel):
    status: Literal["ok", "busy"] = Field(description="busy: the sampler did not answer in time.")
    model: str
    router_version: str
    cur: float
    waiting: int = Field(description="Images in the queue of the replica asked.")
    refused: RefusedRouter | None


class Ready(BaseModel):
    status: Literal["ready"] = "ready"


class Live(BaseModel):
    status: Literal["alive"] = "alive"


class ErrorDetail(BaseModel):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error."""

    error: ErrorDetail
