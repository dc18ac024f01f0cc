"""Sana's folders as diffusers saves them: a transformer with the pipeline around it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harmonica.models.base import Fingerprint
from harmonica.models.diffusers_folder import PipelineParts, find_transformer
from harmonica.models.diffusers_module import StoredModule
from harmonica.models.sana.model import FULL_PRECISION_PARTS, TEXT_TOKENS, Sana
from harmonica.models.text_blocks import Kind
from harmonica.torchvision_ops import ensure_torchvision_imports

CLASS_NAME = "SanaTransformer2DModel"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSana:
    """Checked, still on disk."""

    module: StoredModule
    text_tokens: int
    cacheable: tuple[Kind, ...]
    scheduler: dict[str, Any] | None
    vae_folder: Path | None
    text_folder: Path | None
    """The pipeline's folder, where it has a text encoder."""
    class_names: tuple[str, ...] = ()

    def assemble(self, device: str | torch.device, dtype: torch.dtype) -> Sana:
        """The frozen model, each tensor put where it belongs once."""
        ensure_torchvision_imports()
        from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel

        module = self.module.assemble(SanaTransformer2DModel, device, dtype, FULL_PRECISION_PARTS)
        model = Sana(module, text_tokens=self.text_tokens, cacheable=self.cacheable)
        stored = self.module.tensors
        names = [name for name, _ in module.named_parameters()]
        model.recorded_fingerprint = Fingerprint.of({name: stored[name] for name in names})
        model.eval().requires_grad_(False)
        return model


def read_sana(folder: Path, *, cacheable: tuple[Kind, ...], text_tokens: int = 0) -> StoredSana:
    """The model of a pipeline's folder, or of a transformer's.

    Args:
        text_tokens: padded length of a prompt; 0 takes the pipeline's.
    """
    transformer = find_transformer(folder)
    assert transformer is not None, "the caller has found its class"
    parts = PipelineParts.read(folder)
    return StoredSana(
        module=StoredModule.read(transformer),
        text_tokens=text_tokens or TEXT_TOKENS,
        cacheable=cacheable,
        scheduler=parts.scheduler,
        vae_folder=parts.vae_folder,
        text_folder=folder if parts.has_text_encoder else None,
    )
