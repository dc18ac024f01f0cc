"""Define the answers of the HTTP endpoint: OpenAI's Images API with extensions.

OpenAI's own client passes fields it does not know through.
"""

from typing import Literal

from pydantic import BaseModel, Field

from harmonica.evaluation.plots import PictureFormat

from .image_request import Quality


class Warned(BaseModel):
    """Name a field of the request that was not followed, and say why."""

    param: str
    message: str


class ImageData(BaseModel):
    """Hold one image, as `b64_json`, or as `url` if that was asked for."""

    b64_json: str | None = None
    url: str | None = Field(default=None, description="A data URL; only a lenient server answers with one.")
    revised_prompt: str = Field(description="The class's own name, or the prompt as it was sent.")
    router_version: str = Field(
        description="Version of the router that this image was generated under. While another one is "
        "promoted, replicas may differ for some seconds."
    )


class GenerationDetails(BaseModel):
    """Say how images were generated."""

    seed: int
    router_version: str = Field(
        description="`uncached` if every branch was computed, a speed such as `even-1.8x` without training."
    )
    cur: float = Field(description="Cache utilisation ratio: the share of branch outputs that were reused.")
    num_inference_steps: int
    guidance_scale: float
    batch_size: int = Field(
        description="Number of images that shared the trajectory, those of other requests included."
    )
    inference_time_s: float = Field(
        description="Seconds the trajectory took; the longest one's, if the images took several."
    )


class GenerateResponse(GenerationDetails):
    """Extend OpenAI's `ImagesResponse` by how the images were generated."""

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
    """Mirror OpenAI's count of tokens, which is zero: these models bill none."""

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
    """Send a preview: OpenAI's `ImageGenPartialImageEvent`.

    It is the clean image that the model predicts at a step.
    """

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int
    step: int = Field(description="Number of steps done.")
    num_inference_steps: int


class CompletedEvent(_PictureEvent, GenerationDetails):
    """Send a finished image: OpenAI's `ImageGenCompletedEvent`."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    revised_prompt: str
    warnings: list[Warned] = Field(description="What was not followed, by a server that is lenient.")
    usage: Usage = Field(default_factory=Usage)


class ProgressEvent(_Event):
    """Tell that a step is done; sent if the request sets `progress`."""

    type: Literal["image_generation.progress"] = "image_generation.progress"
    step: int
    num_inference_steps: int


class Sizes(BaseModel):
    """Bound the sizes that a request may ask for."""

    default: tuple[int, int] = Field(description="Width and height.")
    multiple: int = Field(description="Width and height are multiples of this.")
    max_pixels: int = Field(description="Largest width times height.")
    max_side: int = Field(description="Largest width, and largest height.")


class Model(BaseModel):
    """Extend OpenAI's `Model` by what it generates."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "harmonica"
    size: str
    class_names: list[str] = Field(description="Empty if the model takes text.")
    sizes: Sizes | None = Field(None, description="Null if `size` is the only one.")
    max_pictures: int = Field(0, description="Number of pictures that a request may edit at most.")


class UnavailableModel(BaseModel):
    """Name a model that could not be loaded; requests for it are answered 503."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "harmonica"
    error: str = Field(description="Why it could not be loaded.")


class ModelList(BaseModel):
    """List the served models, as OpenAI's endpoint does.

    The first is for requests that name none.
    """

    object: Literal["list"] = "list"
    data: list[Model | UnavailableModel]


class RouterEntry(BaseModel):
    """Describe a served router and its plan, whose row 0 is the last step to run."""

    id: str = Field(description="Its version.")
    object: Literal["router"] = "router"
    quality: list[Quality] = Field(
        description="The qualities it is used for; empty where only `num_inference_steps` picks it."
    )
    cur: float
    ideal_speedup: float
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    plan: list[str] = Field(
        description="One string a step, with 1 for each branch computed and 0 for each reused."
    )
    scores: list[list[float]] = Field(
        description="The router's scores in the shape of the plan; empty where there is no router."
    )


class RouterList(BaseModel):
    """List the routers that are served."""

    object: Literal["list"] = "list"
    data: list[RouterEntry]


class RefusedRouter(BaseModel):
    """Name a champion that cannot be served; the one before still is."""

    version: str
    reason: str


class Health(BaseModel):
    """Describe the state of the endpoint and of its router."""

    status: Literal["ok", "busy"] = Field(description="busy: the sampler did not answer in time.")
    model: str
    router_version: str
    cur: float
    waiting: int = Field(description="Number of images in the queue of the replica asked.")
    refused: RefusedRouter | None


class ModelHealth(BaseModel):
    """Describe the state of one model of several."""

    model: str
    status: Literal["loaded", "unloaded", "failed"] = Field(
        description="unloaded: another model has its place, and a request loads it again."
    )
    router_version: str
    cur: float
    waiting: int
    refused: RefusedRouter | None
    error: str = Field(description="Why it could not be loaded; empty if it could.")


class HealthOfSeveral(Health):
    """Describe the state of an endpoint of several models.

    The fields beside `models` are of the first one that could be loaded.
    """

    models: list[ModelHealth]


class Ready(BaseModel):
    """Confirm that a request would be accepted now."""

    status: Literal["ready"] = "ready"


class Live(BaseModel):
    """Confirm that the process runs."""

    status: Literal["alive"] = "alive"


class ErrorDetail(BaseModel):
    """Say what is wrong, with which parameter, and whose fault it is."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Wrap an error in the shape of OpenAI's."""

    error: ErrorDetail
