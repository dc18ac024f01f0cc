"""A model as it lies on disk, whatever the layout, and the one way from there into memory."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.io.weight_values import check_values
from harmonica.models.base import FINGERPRINT_VALUES, Fingerprint, freeze
from harmonica.models.dit.config import DiTConfig
from harmonica.models.dit.model import DiT, sincos_position_embedding

POSITIONS = "pos_embed"


def skeleton(config: DiTConfig) -> DiT:
    """The model without storage: names and shapes, at no cost."""
    with torch.device("meta"):
        return DiT(config)


def default_class_names(config: DiTConfig) -> tuple[str, ...]:
    """Numbers, where nothing names the classes."""
    return tuple(map(str, range(config.num_embeds_ada_norm)))


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredModel:
    """Checked, still on disk: the tensors are memory-mapped."""

    config: DiTConfig
    tensors: dict[str, tuple[Tensor, ...]] = field(repr=False)
    """By the public code's names; several are the rows of one, in order: diffusers' q, k and v."""
    class_names: tuple[str, ...]
    source: str = "the model"
    """What errors call it."""
    scheduler: dict[str, Any] | None = None
    """Scheduler configuration of a diffusers folder."""
    vae_folder: Path | None = None
    """The VAE of a diffusers folder."""

    def tensor(self, name: str) -> Tensor:
        """One tensor in its stored precision: mapped, or copied where it is stored in pieces."""
        pieces = self.tensors[name]
        return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)

    def positions(self) -> Tensor:
        """The stored position table, or the fixed one where the layout leaves it out."""
        if POSITIONS in self.tensors:
            return self.tensor(POSITIONS)
        return sincos_position_embedding(
            self.config.hidden_size, self.config.sample_size // self.config.patch_size
        )

    def assemble(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> DiT:
        """The frozen model with each tensor put where it belongs once, in its final precision.

        Nothing is allocated before: peak memory is the weights and one tensor. What is already of
        this precision stays mapped on the CPU.

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
