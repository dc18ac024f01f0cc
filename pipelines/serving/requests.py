"""The words in which an endpoint and what draws for it talk: orders, drawings and what is served."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from harmonica.data.text_encoder import PromptTooLong
from harmonica.evaluation.plots import PictureFormat
from harmonica.validation.finite import NotFinite
from pipelines.serving.batching import Overloaded, TimedOut
from pipelines.serving.image_sampler import Quality, Row, SettingRefused

MAX_PARTIAL_IMAGES = 3
REFUSALS = (Overloaded, TimedOut, SettingRefused, PromptTooLong, NotFinite)
"""What an order may be answered with instead of a drawing."""


@dataclass(frozen=True, slots=True)
class Order:
    """One image as a client wants it."""

    row: Row
    quality: Quality = "medium"
    num_inference_steps: int | None = None
    """Default: the router's."""
    company: int = 1
    """Images of the same request, which are drawn together where they can be."""
    timeout_s: float | None = None
    """How long it may wait for its trajectory. Default: the server's bound."""
    output_format: PictureFormat = "png"
    output_compression: int = 100
    """Of jpeg and webp, 0 to 100, the best."""
    partial_images: int = 0
    """Previews while it is drawn, 0 to 3."""
    progress: bool = False
    """Whether every step is reported."""


@dataclass(frozen=True, slots=True)
class Progress:
    """So far the trajectory has come."""

    step: int
    """Steps done."""
    num_steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """The image that a step points at."""

    picture: bytes = field(repr=False)
    index: int
    """Number of the preview."""
    step: int
    """Steps done."""
    num_steps: int


@dataclass(frozen=True, slots=True)
class Drawing:
    """One image, and how it came about."""

    picture: bytes = field(repr=False)
    router_version: str
    cur: float
    num_inference_steps: int
    guidance_scale: float
    batch_size: int
    """Images that shared the trajectory."""
    seconds: float
    """Of the trajectory."""


@dataclass(frozen=True, slots=True)
class RouterCard:
    """A router that is served."""

    version: str
    quality: tuple[Quality, ...]
    """What it is used for."""
    cur: float
    ideal_speedup: float
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    plan: tuple[str, ...]
    """A string of 0 (reused) and 1 (computed) a step, step 0, the last to run, first."""
    scores: tuple[tuple[float, ...], ...]
    """Of the same shape; empty where every branch is computed."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A router that was to be served and is not."""

    version: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What is served."""

    model: str
    router_version: str
    cur: float
    class_names: tuple[str, ...]
    """Empty where the model takes text."""
    image_size: int
    max_images: int
    """Upper bound of `n`."""
    routers: tuple[RouterCard, ...] = ()
    refused: Refusal | None = None
    """The registry's champion, where that cannot be served."""
    waiting: int = 0
    """Images in the queue."""
    max_waiting: int = 0
    """Room in it."""

    @property
    def is_full(self) -> bool:
        return self.waiting >= self.max_waiting > 0

    @property
    def size(self) -> str:
        return f"{self.image_size}x{self.image_size}"


class ImageSource(Protocol):
    """Where images come from: Serve replicas, or a `Studio` in this process."""

    async def describe(self) -> ModelCard: ...

    async def draw(self, order: Order) -> Drawing:
        """
        Raises:
            one of `REFUSALS`
        """
        ...

    def watch(self, order: Order) -> AsyncIterator[Progress | Preview | Drawing]:
        """What was ordered of progress and previews, then the drawing; raises what `draw` does."""
        ...
