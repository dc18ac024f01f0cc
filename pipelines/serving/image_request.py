"""Describe one image to generate, and reject a setting that it cannot have."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from harmonica.validation.settings import SettingError

Quality = Literal["low", "medium", "high"]
"""`high` computes every branch, `medium` uses the champion's plan, and `low` that of the fastest router."""


class SettingRejected(ValueError):
    """A request has a setting that this model or router cannot generate with.

    Args:
        field: name of the request's field.
        message: the whole message, which begins with that name.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field
        self.message = message  # Ray's own copies of errors have a traceback for a text

    def __str__(self) -> str:
        return self.message


@contextmanager
def rejecting(field: str) -> Iterator[None]:
    """Turn an error of the sampler's settings into a `SettingRejected`.

    Args:
        field: name of the request's field, which is that of the sampler's setting.
    """
    try:
        yield
    except SettingError as error:
        message = f"{field} {error.reason}" if error.field == f"sampler.{field}" else str(error)
        raise SettingRejected(field, message) from error
    except ValueError as error:
        raise SettingRejected(field, str(error)) from error


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture to edit is kept as its file until its image is made.

    A file of a kilobyte may hold 50 MB of pixels, and requests wait.
    """

    width: int
    """Its pixels across, as it is decoded (`pipelines.serving.pictures`)."""
    height: int
    file: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """These inputs determine one image: under one router it depends on nothing else."""

    subject: int | str = field(repr=False)  # prompts are kept out of logs
    """A class label, or a prompt."""
    seed: int
    index: int
    """Number of the image within its request."""
    negative_prompt: str = field(default="", repr=False)
    """What the image should not show, for models that take prompts."""
    guidance_scale: float | None = None
    """Default: the sampler's own; where a router is used no other scale is allowed."""
    size: tuple[int, int] | None = None
    """Width and height, where the model leaves the choice. Default: the model's own, or a picture's shape."""
    pictures: tuple[Picture, ...] = field(default=(), repr=False)
    """Pictures to edit, for models that take some."""
