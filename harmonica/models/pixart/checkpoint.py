"""PixArt-alpha and -Sigma from a diffusers folder, as of PixArt-alpha/PixArt-Sigma-XL-2-1024-MS."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harmonica.models.base import Fingerprint
from harmonica.models.diffusers_folder import PipelineParts, find_transformer
from harmonica.models.diffusers_module import StoredModule
from harmonica.models.pixart.model import PixArt
from harmonica.models.text_blocks import Kind
from harmonica.torchvision_ops import ensure_torchvision_imports

CLASS_NAME = "PixArtTransformer2DModel"
_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Padded length of a prompt in diffusers' pipelines."""
_INSIDE = "transformer."  # where `PixArt` keeps the module


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPixArt:
    """Checked, still on disk."""

    module: StoredModule
    text_tokens: int
    cacheable: tuple[Kind, ...]
    scheduler: dict[str, Any] | None
    vae_folder: Path | None
    text_folder: Path | None
    """The pipeline's folder, where it has a text encoder."""
    class_names: tuple[str, ...] = ()

    def assemble(self, device: str | torch.device, dtype: torch.dtype) -> PixArt:
        """The frozen model, each tensor put where it belongs once."""
        ensure_torchvision_imports()
        from diffusers import PixArtTransformer2DModel

        full = tuple(name.removeprefix(_INSIDE) for name in PixArt.full_precision_parts)
        module = self.module.assemble(PixArtTransformer2DModel, device, dtype, full)
        model = PixArt(module, text_tokens=self.text_tokens, cacheable=self.cacheable)
        stored = self.module.tensors
        model.recorded_fingerprint = Fingerprint.of(
            {name: stored[name] for name, _ in module.named_parameters()}
        )
        model.eval().requires_grad_(False)
        return model


def read_pixart(folder: Path, *, cacheable: tuple[Kind, ...], text_tokens: int = 0) -> StoredPixArt:
    """The model of a pipeline's folder, or of a transformer's.

    Args:
        text_tokens: padded length of a prompt; 0 takes the pipeline's.

    Raises:
        ValueError: unreadable, or a length that nothing tells.
    """
    transformer = find_transformer(folder)
    assert transformer is not None, "the caller has found its class"
    parts = PipelineParts.read(folder)
    tokens = text_tokens or _TOKENS.get(parts.class_name, 0)
    if not tokens:
        raise ValueError(
            f"model.text_tokens is 0 and {folder} does not say which pipeline it belongs to: give the padded "
            "length of a prompt, 120 for PixArt-alpha and 300 for PixArt-Sigma"
        )
    return StoredPixArt(
        module=StoredModule.read(transformer),
        text_tokens=tokens,
        cacheable=cacheable,
        scheduler=parts.scheduler,
        vae_folder=parts.vae_folder,
        text_folder=folder if parts.has_text_encoder else None,
    )
