"""Shapes of DiTs, and the public family (Peebles and Xie 2023, table 1)."""

from typing import Annotated, Literal

from harmonica.validation.settings import Count, Field, require, settings


@settings("model.shape")
class DiTConfig:
    """Shape of a DiT and two conventions of its function, under diffusers' names."""

    sample_size: Count = 32
    """Height and width of the (latent) image."""
    patch_size: Count = 2
    """Height and width of the pixels or latents of one token."""
    in_channels: Count = 4
    """Channels of the image or latent: 4 of the public autoencoders."""
    out_channels: Count = 8
    """Twice `in_channels` where the model also predicts the variance."""
    num_layers: Count = 28
    """Blocks, each with two branches that a router may reuse."""
    num_attention_heads: Count = 16
    """Heads of each self-attention."""
    attention_head_dim: Count = 72
    """Width of a head; times the heads it is the width of a token."""
    num_embeds_ada_norm: Count = 1000
    """Number of classes; the null class comes on top."""
    downscale_freq_shift: Literal[0, 1] = 0
    """Timestep frequencies are spaced by half (0, the public code) or half - 1 (1, diffusers)."""
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    """Epsilon of the norm before each MLP: 1e-6 in the public code, 1e-5 in most diffusers folders."""

    def __post_init__(self) -> None:
        require(
            self.sample_size % self.patch_size == 0,
            "model.shape.sample_size",
            self.sample_size,
            f"give a multiple of model.shape.patch_size ({self.patch_size})",
        )
        require(
            self.out_channels in (self.in_channels, 2 * self.in_channels),
            "model.shape.out_channels",
            self.out_channels,
            f"give model.shape.in_channels ({self.in_channels}) or twice that",
        )

    @property
    def hidden_size(self) -> int:
        """Return D, the width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_tokens(self) -> int:
        """Return L, the number of patches of a latent."""
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
    """Return the shape of a public model, such as `DiT-XL/2`, for an image size.

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
