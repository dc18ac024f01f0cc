"""The condition of a text-to-image model: embedded prompts and negative prompts.

Shapes: N batch, S text tokens, C width of the text encoder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

_EMBEDDINGS = ("embeddings", "negative_embeddings")
_NEGATIVES = ("negative_embeddings", "negative_mask")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextCondition:
    """Embedded prompts, one row an image; indexed like a batch of labels."""

    embeddings: Tensor
    """(N, S, C) output of the text encoder."""
    mask: Tensor
    """(N, S) bool, False at padding."""
    negative_embeddings: Tensor | None = None
    """(N, S, C) of each row's negative prompt, used under classifier-free guidance."""
    negative_mask: Tensor | None = None
    """(N, S) bool."""
    resolution: Tensor | None = None
    """(N, 2) height and width in pixels: size conditioning of PixArt-alpha at 1024."""
    aspect_ratio: Tensor | None = None
    """(N, 1) height / width."""

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 3:
            raise ValueError(
                f"condition.embeddings has shape {tuple(self.embeddings.shape)}: give (N, S, C), rows by a "
                "slice or a list of indices"
            )
        n, s, c = self.embeddings.shape
        shapes: dict[str, tuple[int, ...]] = {"mask": (n, s), "resolution": (n, 2), "aspect_ratio": (n, 1)}
        shapes |= {"negative_embeddings": (n, s, c), "negative_mask": (n, s)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(
                    f"condition.{name} has shape {tuple(value.shape)}: give {shape}, as embeddings has "
                    f"{(n, s, c)}"
                )
            if value is not None and name.endswith("mask") and value.dtype != torch.bool:
                raise ValueError(f"condition.{name} is {value.dtype}: give bool, such as mask.bool()")
        for one, other in (_NEGATIVES, ("resolution", "aspect_ratio")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise ValueError(f"condition has one of {one} and {other}: give both or neither")

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> "TextCondition":
        return self._each(lambda _, value: value[rows])

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "TextCondition":
        """Move to a device and convert the embeddings; sizes keep their precision."""
        return self._each(
            lambda name, value: value.to(device=device, dtype=dtype if name in _EMBEDDINGS else None)
        )

    def guided(self) -> "TextCondition":
        """Return the N prompts, then their N negative ones, for classifier-free guidance.

        Raises:
            ValueError: no negative prompts.
        """
        if self.negative_embeddings is None or self.negative_mask is None:
            raise ValueError(
                "condition.negative_embeddings is None and the sampler guides: give those of the negative "
                'prompts ("" where there are none), or sampler.guidance_scale 1'
            )
        return TextCondition(
            embeddings=torch.cat([self.embeddings, self.negative_embeddings]),
            mask=torch.cat([self.mask, self.negative_mask]),
            resolution=_twice(self.resolution),
            aspect_ratio=_twice(self.aspect_ratio),
        )

    @classmethod
    def concatenate(cls, conditions: Sequence["TextCondition"]) -> "TextCondition":
        """Concatenate the rows of several conditions in order.

        Raises:
            ValueError: only some of them have a field, or their numbers of tokens differ.
        """
        joined: dict[str, Any] = {}
        for name in _names():
            values = [getattr(condition, name) for condition in conditions]
            present = [value for value in values if value is not None]
            if present and len(present) < len(values):
                raise ValueError(f"condition.{name} is None in some batches: give it in all or in none")
            if len({value.shape[1:] for value in present}) > 1:
                raise ValueError(
                    f"condition.{name} has rows of {', '.join(str(tuple(v.shape[1:])) for v in present)}: "
                    "pad all prompts to one number of tokens, by the same text encoder"
                )
            joined[name] = torch.cat(present) if present else None
        return cls(**joined)

    def _each(self, change: Callable[[str, Tensor], Tensor]) -> "TextCondition":
        changed: dict[str, Any] = {name: getattr(self, name) for name in _names()}
        changed |= {name: change(name, value) for name, value in changed.items() if value is not None}
        return TextCondition(**changed)


def _names() -> list[str]:
    return [field.name for field in fields(TextCondition)]


def _twice(value: Tensor | None) -> Tensor | None:
    return None if value is None else torch.cat([value, value])
