"""Text-to-image transformers in diffusers folders, and their loading."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harmonica.models.base import freeze
from harmonica.models.diffusers_folder import PipelineParts, find_transformer
from harmonica.models.diffusers_module import StoredModule
from harmonica.models.fingerprint import Fingerprint
from harmonica.models.text_blocks import Kind
from harmonica.models.text_transformer import TextTransformer
from harmonica.torchvision_ops import ensure_torchvision_imports

_INSIDE = "transformer."  # where a `TextTransformer` keeps the module


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTextTransformer:
    """A transformer whose files have been checked and are still on disk."""

    model_class: type[TextTransformer]
    module: StoredModule
    text_tokens: int
    cacheable: tuple[Kind, ...]
    scheduler: dict[str, Any] | None
    vae_folder: Path | None
    text_folder: Path | None
    """The pipeline's folder, if it has a text encoder."""
    class_names: tuple[str, ...] = ()

    @classmethod
    def read(
        cls,
        folder: Path,
        parts: PipelineParts,
        model_class: type[TextTransformer],
        *,
        text_tokens: int,
        cacheable: tuple[Kind, ...],
    ) -> "StoredTextTransformer":
        """Read the folder of a pipeline or of its transformer.

        Args:
            parts: what `PipelineParts.read` found in the folder.
            text_tokens: padded length of a prompt.

        Raises:
            ValueError: no usable config.json or weights.
        """
        transformer = find_transformer(folder)
        assert transformer is not None, "the caller has found its class"
        return cls(
            model_class=model_class,
            module=StoredModule.read(transformer),
            text_tokens=text_tokens,
            cacheable=cacheable,
            scheduler=parts.scheduler,
            vae_folder=parts.vae_folder,
            text_folder=folder if parts.has_text_encoder else None,
        )

    def assemble(self, device: str | torch.device, dtype: torch.dtype) -> TextTransformer:
        """Load the frozen model; each tensor is put where it belongs once.

        Raises:
            ValueError: the weights do not fit the configuration, are zero, or not finite; names which.
        """
        ensure_torchvision_imports()
        full = tuple(name.removeprefix(_INSIDE) for name in self.model_class.full_precision_parts)
        module = self.module.assemble(self.model_class.module_class(), device, dtype, full)
        create: Any = self.model_class  # its own `__init__`, not that of the base class
        model: TextTransformer = create(module, text_tokens=self.text_tokens, cacheable=self.cacheable)
        stored = self.module.tensors
        model.recorded_fingerprint = Fingerprint.of(
            {name: stored[name] for name, _ in module.named_parameters()}
        )
        freeze(model)
        return model
