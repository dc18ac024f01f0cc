"""Types that the HTTP endpoint and the generation engine exchange: requests, results and the model card."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from harmonica.data.text_encoder import PromptTooLong
from harmonica.evaluation.plots import PictureFormat
from harmonica.validation.finite import NotFinite

from .batching import Overloaded, TimedOut
from .image_request import ImageRequest, Quality, SettingRejected

MAX_PARTIAL_IMAGES = 3
REJECTIONS = (Overloaded, TimedOut, SettingRejected, PromptTooLong, NotFinite)
"""The expected errors that a request can end with; any other exception is a bug."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One image to generate, with the quality, the time limit and the format that the client asks for."""

    image: ImageRequest
    quality: Quality = "medium"
    num_inference_steps: int | None = None
    """Default: the router's."""
    group_size: int = 1
    """Number of images in the same HTTP request; they share a batch where they can."""
    timeout_s: float | None = None
    """How long it may wait for its trajectory to start. Default: the server's bound."""
    output_format: PictureFormat = "png"
    output_compression: int = 100
    """Quality of a jpeg or webp file, from 0 to 100, the best."""
    partial_images: int = 0
    """Number of previews to send before the image, 0 to 3."""
    progress: bool = False
    """Whether every step is reported."""


@dataclass(frozen=True, slots=True)
class Progress:
    """An event that reports how many steps of an image's trajectory are done."""

    step: int
    """Number of steps done."""
    num_steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """An event with the clean image that the sampler predicts at an intermediate step."""

    picture: bytes = field(repr=False)
    index: int
    """Number of the preview within its image."""
    step: int
    """Number of steps done."""
    num_steps: int


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """A finished image as an encoded file, with the settings and the batch it was generated in."""

    picture: bytes = field(repr=False)
    router_version: str
    cur: float
    num_inference_steps: int
    guidance_scale: float
    batch_size: int
    """Number of images that shared the trajectory."""
    seconds: float
    """Duration of the trajectory."""


@dataclass(frozen=True, slots=True)
class RouterCard:
    """Description of a router that is served."""

    version: str
    quality: tuple[Quality, ...]
    """The qualities that it is used for."""
    cur: float
    ideal_speedup: float
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    plan: tuple[str, ...]
    """One string a step, with 0 for a reused branch and 1 for a computed one; step 0, the last to run, comes
    first."""
    scores: tuple[tuple[float, ...], ...]
    """The router's scores in the same shape; empty where every branch is computed."""


@dataclass(frozen=True, slots=True)
class RejectedRouter:
    """A router version that the registry asks for and this replica cannot serve."""

    version: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Description of the served model, its routers and the state of the queue."""

    model: str
    router_version: str
    cur: float
    class_names: tuple[str, ...]
    """Empty where the model takes text."""
    image_size: int
    max_images: int
    """Upper bound of `n`."""
    routers: tuple[RouterCard, ...] = ()
    rejected: RejectedRouter | None = None
    """The registry's champion, if it cannot be served and an earlier router still is."""
    waiting: int = 0
    """Number of images in the queue."""
    max_waiting: int = 0
    """Number of images that the queue holds at most; 0 where it has no bound."""

    @property
    def is_full(self) -> bool:
        return self.waiting >= self.max_waiting > 0

    @property
    def size(self) -> str:
        return f"{self.image_size}x{self.image_size}"


class ImageSource(Protocol):
    """A source of images for the HTTP app: Serve replicas, or a `GenerationEngine` in this process."""

    async def describe(self) -> ModelCard: ...

    async def generate(self, request: EngineRequest) -> GeneratedImage:
        """Generate one image.

        Raises:
            one of `REJECTIONS`
        """
        ...

    def generate_stream(self, request: EngineRequest) -> AsyncIterator[Progress | Preview | GeneratedImage]:
        """Yield the progress and the previews that were asked for, and then the image.

        Raises:
            one of `REJECTIONS`
        """
        ...
