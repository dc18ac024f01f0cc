"""A DiT on disk, in any layout, and its loading into memory."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.io.weight_values import check_values
from harmonica.models.base import freeze
from harmonica.models.dit.config import DiTConfig
from harmonica.models.dit.model import DiT, sincos_position_embedding
from harmonica.models.fingerprint import FINGERPRINT_VALUES, Fingerprint

POSITIONS = "pos_embed"


def skeleton(config: DiTConfig) -> DiT:
    """Build the model on the meta device: names and shapes without storage."""
    with torch.device("meta"):
        return DiT(config)


def default_class_names(config: DiTConfig) -> tuple[str, ...]:
    """Return the class numbers as names, for models that name no classes."""
    return tuple(map(str, range(config.num_embeds_ada_norm)))


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredModel:
    """A DiT whose files have been checked; the tensors are memory-mapped."""

    config: DiTConfig
    tensors: dict[str, tuple[Tensor, ...]] = field(repr=False)
    """Tensors by the public code's names; several are concatenated by rows, as diffusers' q, k and v."""
    class_names: tuple[str, ...]
    source: str = "the model"
    """Name of the model in error messages."""
    scheduler: dict[str, Any] | None = None
    """Scheduler configuration of a diffusers folder."""
    vae_folder: Path | None = None
    """The VAE of a diffusers folder."""

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in its stored precision, copied only if it is in pieces."""
        pieces = self.tensors[name]
        return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)

    def positions(self) -> Tensor:
        """Return the stored position table, or the fixed one if the layout has none."""
        if POSITIONS in self.tensors:
            return self.tensor(POSITIONS)
        return sincos_position_embedding(
            self.config.hidden_size, self.config.sample_size // self.config.patch_size
        )

    def assemble(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> DiT:
        """Load the frozen model; each tensor is converted and moved once.

        Peak memory is the weights and one tensor. On the CPU, tensors that already have this precision
        stay memory-mapped.

        Raises:
            ValueError: weights that are zero or not finite; names them.
        """
        model = skeleton(self.config)
        state, first_values = {}, {}
        for name, _ in model.named_parameters():
            stored = self.tensor(name)
            first_values[name] = stored.flatten()[:FINGERPRINT_VALUES].clone()
            is_full = name.startswith(model.full_precision_parts)
            state[name] = stored.to(device=device, dtype=torch.float32 if is_full else dtype)
        state[POSITIONS] = self.positions().to(device=device, dtype=torch.float32)
        check_values(state, self.source)
        model.load_state_dict(state, assign=True)
        model.recorded_fingerprint = Fingerprint.of(first_values)
        freeze(model)
        return model
