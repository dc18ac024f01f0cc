"""Decoding of latents to images by AutoencoderKL and Sana's AutoencoderDC."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.io.weight_files import find_weights
from harmonica.models.base import BranchedTransformer
from harmonica.torchvision_ops import ensure_torchvision_imports
from harmonica.validation.extras import need

_CLASS_NAMES = ("AutoencoderKL", "AutoencoderDC")


def find_vae(folder: Path) -> Path | None:
    """Return the VAE's folder: `vae` in `folder`, `folder` itself, or None."""
    for candidate in (folder / "vae", folder):
        try:
            config = json.loads((candidate / "config.json").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and config.get("_class_name") in _CLASS_NAMES:
            return candidate
    return None


def check_vae(folder: Path) -> None:
    """Check that a folder found by `find_vae` has weights.

    Raises:
        ValueError: weights are missing; the message lists the files there.
    """
    try:
        find_weights(folder)
    except ValueError as error:
        raise ValueError(f"model.vae: {error}") from error


def load_vae(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Load the frozen autoencoder of a folder found by `find_vae`.

    Raises:
        ValueError: its files cannot be read, or fit one another.
    """
    ensure_torchvision_imports()
    need("diffusers", extra="diffusers")
    import diffusers

    try:
        name = json.loads((folder / "config.json").read_text())["_class_name"]
        if name not in _CLASS_NAMES:
            raise ValueError(f"it is a {name}")
        weights = find_weights(folder)
        vae = getattr(diffusers, name).from_pretrained(
            str(folder),
            dtype=dtype,
            variant=weights.variant or None,
            use_safetensors=weights.is_safe,
            local_files_only=True,
            low_cpu_mem_usage=False,
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(
            f"model.vae {folder} cannot be loaded ({error}): give a folder of {' or '.join(_CLASS_NAMES)}"
        ) from error
    vae.enable_slicing()  # image by image: its memory is a multiple of the denoiser's
    return vae.to(device).eval().requires_grad_(False)


def draws_pixels(model: BranchedTransformer) -> bool:
    """Return whether a model samples pixels (grey or RGB) rather than latents."""
    return are_pixels(model.in_channels)


def are_pixels(in_channels: object) -> bool:
    """Return whether a configuration's number of channels is that of pixels."""
    return in_channels in (1, 3)


def pixels_per_latent(vae: Any) -> int:
    """Return the number of pixels along one side of a latent."""
    config = vae.config
    widths = config.get("block_out_channels") or config.encoder_block_out_channels
    return 1 << (len(widths) - 1)


@torch.no_grad()
def decode_latents(vae: Any, latents_NCHW: Tensor) -> Tensor:
    """Decode latents to float32 images (N, 3, H, W) in [-1, 1]; NaN where not finite."""
    latents = latents_NCHW.to(device=vae.device, dtype=vae.dtype) / vae.config.scaling_factor
    shift = getattr(vae.config, "shift_factor", None)
    if shift is not None:
        latents = latents + shift
    images: Tensor = vae.decode(latents).sample.float()
    return images.clamp(-1, 1).where(images.isfinite(), torch.nan)  # an overflow would be clamped to black
