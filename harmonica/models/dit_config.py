"""Shapes of DiTs: the configuration, and the public family (Peebles and Xie 2023, table 1)."""

import math
from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTConfig:
    """Shape of a DiT and the two conventions its function depends on, under diffusers' names."""

    sample_size: int = 32
    """Height and width of the (latent) image."""
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8
    """Twice `in_channels` where the model also predicts the variance."""
    num_layers: int = 28
    num_attention_heads: int = 16
    attention_head_dim: int = 72
    num_embeds_ada_norm: int = 1000
    """Number of classes; the null class comes on top."""
    downscale_freq_shift: Literal[0, 1] = 0
    """Timestep frequencies are spaced by half (0, the public code) or half - 1 (1, diffusers)."""
    norm_eps: float = 1e-6
    """Epsilon of the norm before each MLP: 1e-6 in the public code, 1e-5 in most diffusers folders."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name == "norm_eps":
                if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                    raise ValueError(f"model.norm_eps is {value!r}: give a small positive number")
            elif name == "downscale_freq_shift":
                if value not in (0, 1):
                    raise ValueError(f"model.{name} is {value!r}: give 0 (public code) or 1 (diffusers)")
            elif not isinstance(value, int) or value < 1:
                raise ValueError(f"model.{name} is {value!r}: give a positive whole number")
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"model.sample_size {self.sample_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(f"model.out_channels is {self.out_channels}: give in_channels or twice that")

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_tokens(self) -> int:
        return (self.sample_size // self.patch_size) ** 2


# Layers, width, heads.
_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
_PATCHES = (2, 4, 8)

FAMILY = tuple(f"DiT-{size}/{patch}" for size in _SIZES for patch in _PATCHES)
"""Names of the public models."""
HEADS_OF_WIDTH = {width: heads for _, width, heads in _SIZES.values()}
"""A checkpoint shows its width, never its number of heads: the family gives it."""

_LATENT_SCALE = 8  # the VAE's


def dit_shape(name: str, image_size: int = 256, num_classes: int = 1000) -> DiTConfig:
    """Shape of a public model by name, such as `DiT-XL/2`, for images of `image_size` pixels.

    Raises:
        ValueError: no such model, or an image size that gives no whole number of patches.
    """
    if name not in FAMILY:
        raise ValueError(f"model name is {name!r}: give one of {', '.join(FAMILY)}")
    size, patch = name.removeprefix("DiT-").split("/")
    layers, width, heads = _SIZES[size]
    if image_size < 1 or image_size % (_LATENT_SCALE * int(patch)):
        raise ValueError(
            f"image_size is {image_size}: give a multiple of {_LATENT_SCALE * int(patch)} for {name}"
        )
    return DiTConfig(
        sample_size=image_size // _LATENT_SCALE,
        patch_size=int(patch),
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        num_embeds_ada_norm=num_classes,
    )
