"""What the HTTP endpoint answers: OpenAI's Images API with extensions, which its own client hands through."""

from typing import Literal

from pydantic import BaseModel, Field

from harmonica.evaluation.plots import PictureFormat
from pipelines.serving.image_sampler import Quality


class Warned(BaseModel):
    """A field of the request that was not followed."""

    param: str
    message: str


class ImageData(BaseModel):
    """One image: `b64_json`, or `url` where that was asked for."""

    b64_json: str | None = None
    url: str | None = Field(default=None, description="A data URL, of a server that is lenient.")
    revised_prompt: str = Field(description="The class's own name, or the prompt as it was.")


class GenerationDetails(BaseModel):
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


class GenerateResponse(GenerationDetails):
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


class CompletedEvent(_PictureEvent, GenerationDetails):
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
    """The models that are served, as OpenAI's API lists them."""

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
    """The routers that are served."""

    object: Literal["list"] = "list"
    data: list[RouterEntry]


class RefusedRouter(BaseModel):
    """The registry's champion, where it cannot be served and the one before still is."""

    version: str
    reason: str


class Health(BaseModel):
    """What is served, and whether it answers."""

    status: Literal["ok", "busy"] = Field(description="busy: the sampler did not answer in time.")
    model: str
    router_version: str
    cur: float
    waiting: int = Field(description="Images in the queue of the replica asked.")
    refused: RefusedRouter | None


class Ready(BaseModel):
    """The endpoint takes requests."""

    status: Literal["ready"] = "ready"


class Live(BaseModel):
    """The process runs."""

    status: Literal["alive"] = "alive"


class ErrorDetail(BaseModel):
    """What was wrong with a request, as OpenAI's API says it."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error."""

    error: ErrorDetail
