"""The public models by name and image size, without storage."""

from collections.abc import Callable

import torch

from harmonica.models.base import BranchedTransformer
from harmonica.models.dit.config import dit_shape
from harmonica.models.dit.stored import skeleton
from harmonica.torchvision_ops import ensure_torchvision_imports


def dit_skeleton(image_size: int) -> BranchedTransformer:
    """Return DiT-XL/2 for an image size, without storage.

    Raises:
        ValueError: an image size that gives no whole number of patches.
    """
    return skeleton(dit_shape("DiT-XL/2", image_size))


def pixart_skeleton(image_size: int, text_tokens: int) -> BranchedTransformer:
    """Return a PixArt of an image size, without storage.

    PixArt-alpha and PixArt-Sigma differ in their text.
    """
    ensure_torchvision_imports()
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    from harmonica.models.pixart.model import PixArt

    with torch.device("meta"):
        transformer = PixArtTransformer2DModel(sample_size=image_size // 8, use_additional_conditions=False)
        return PixArt(transformer, text_tokens=text_tokens)


MODELS: dict[str, Callable[[], BranchedTransformer]] = {
    "dit-xl-2-256": lambda: dit_skeleton(256),
    "dit-xl-2-512": lambda: dit_skeleton(512),
    "pixart-alpha-256": lambda: pixart_skeleton(256, 120),
    "pixart-alpha-512": lambda: pixart_skeleton(512, 120),
    "pixart-alpha-1024": lambda: pixart_skeleton(1024, 120),
    "pixart-sigma-2048": lambda: pixart_skeleton(2048, 300),
}
"""The public models by name and image size, without storage."""
