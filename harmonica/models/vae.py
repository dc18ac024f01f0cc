"""diffusers' AutoencoderKL: from latents to images."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.models.base import BranchedTransformer
from harmonica.torchvision_ops import ensure_torchvision_imports

_CLASS_NAME = "AutoencoderKL"


def find_vae(folder: Path) -> Path | None:
    """The VAE's folder: `vae` in a pipeline's folder, or `folder` itself."""
    for candidate in (folder / "vae", folder):
        try:
            config = json.loads((candidate / "config.json").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and config.get("_class_name") == _CLASS_NAME:
            return candidate
    return None


def load_vae(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' AutoencoderKL of a folder, frozen.

    Raises:
        ValueError: its files cannot be read, or fit one another.
    """
    ensure_torchvision_imports()
    from diffusers import AutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(
            str(folder), torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"model.vae {folder} cannot be loaded ({error}): give an {_CLASS_NAME} folder"
        ) from error
    vae.enable_slicing()  # image by image: its memory is a multiple of the denoiser's
    return vae.to(device).eval().requires_grad_(False)


def draws_pixels(model: BranchedTransformer) -> bool:
    """Whether a model's samples are pictures as they are: grey or RGB."""
    return model.in_channels in (1, 3)


def pixels_per_latent(vae: Any) -> int:
    """Pixels along one side of a latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def decode_latents(vae: Any, latents_NCHW: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1], float32, of latents in the model's scale."""
    latents = latents_NCHW.to(device=vae.device, dtype=vae.dtype) / vae.config.scaling_factor
    shift = getattr(vae.config, "shift_factor", None)
    if shift is not None:
        latents = latents + shift
    return vae.decode(latents).sample.float().clamp(-1, 1)
