"""diffusers' `DiTTransformer2DModel` seen as branches, with nothing copied.

The same network as our `DiT` of a diffusers folder, and the same identity, so a router trained on one
fits the other. Here the weights stay where a pipeline has them.
Shapes: N batch, C channels, H W image, L tokens, D width.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harmonica.models.base import BranchedTransformer, Macs, unpatchify
from harmonica.models.dit.conditioning import DiTConditioning
from harmonica.models.dit.diffusers_layout import config_from_diffusers, tensors_from_diffusers
from harmonica.models.dit.model import DiTBranch, modulate
from harmonica.models.dit.stored import skeleton
from harmonica.models.fingerprint import FINGERPRINT_VALUES, Fingerprint

if TYPE_CHECKING:  # seconds to import, and whoever has the module has imported it
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

_NAME = "transformer"  # what errors call it, as pipelines do
_FUSED_COPIES = ("to_qkv", "to_kv", "to_added_qkv")


def base_parameters(module: nn.Module) -> Mapping[str, Tensor]:
    """Return parameters by their names without adapters, which PEFT changes.

    Without the copies either, in one layer, that `fuse_qkv_projections` makes of queries, keys and values.
    """
    adapted = {name for name, part in module.named_modules() if hasattr(part, "base_layer")}
    found = {}
    for name, parameter in module.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner.rpartition(".")[2] in _FUSED_COPIES:
            continue
        layer, is_base, _ = owner.rpartition(".base_layer")
        if is_base and layer in adapted:
            found[f"{layer}.{leaf}"] = parameter
        elif not any(owner.startswith(f"{each}.") for each in adapted):
            found[name] = parameter
    return found


class DiffusersDiT(BranchedTransformer):
    """A `DiTTransformer2DModel`; its condition is a batch of labels.

    All in the precision that the module has, as by diffusers. The timestep and the label are embedded
    once for all blocks, by the first block's embedder: all have the same.
    """

    def __init__(self, transformer: "DiTTransformer2DModel") -> None:
        """Make a view of diffusers' module, whose weights it shares.

        Raises:
            ValueError: a configuration that makes it no DiT.
        """
        super().__init__()
        settings = {**transformer.config, "_class_name": type(transformer).__name__}
        self.config = config_from_diffusers(settings, _NAME)
        self.transformer: Any = transformer  # as an nn.Module, its parts would be Tensor | Module
        self.in_channels, self.out_channels = self.config.in_channels, self.config.out_channels
        self.sample_size, self.num_classes = self.config.sample_size, self.config.num_embeds_ada_norm
        self._macs = skeleton(self.config).macs()
        self.branches = []
        blocks: Any = transformer.transformer_blocks
        for i, block in enumerate(blocks):
            attention, mlp = self._macs.branches[2 * i : 2 * i + 2]
            self.branches.append(DiTBranch(i, "attn", block.attn1, attention, block.norm1.norm.eps))
            self.branches.append(DiTBranch(i, "mlp", block.ff, mlp, block.norm3.eps))

    def embed(
        self, sample_NCHW: Tensor, timestep_N: Tensor, condition_N: Tensor
    ) -> tuple[Tensor, DiTConditioning]:
        model = self.transformer
        hidden = model.pos_embed(sample_NCHW)
        embedder = model.transformer_blocks[0].norm1.emb
        c_ND = F.silu(embedder(timestep_N, condition_N, hidden_dtype=hidden.dtype))
        blocks = [block.norm1.linear(c_ND).chunk(6, dim=1) for block in model.transformer_blocks]
        return hidden, DiTConditioning(blocks, model.proj_out_1(c_ND).chunk(2, dim=1))

    def head(self, hidden_NLD: Tensor, conditioning: DiTConditioning) -> Tensor:
        model = self.transformer
        patches = model.proj_out_2(modulate(model.norm_out(hidden_NLD), *conditioning.final))
        side = math.isqrt(patches.shape[1])
        return unpatchify(patches, (side, side), self.config.patch_size)

    @property
    def value_shape(self) -> tuple[int, int]:
        return self.config.num_tokens, self.config.hidden_size

    def guided_condition(self, condition_N: Tensor) -> Tensor:
        return torch.cat([condition_N, torch.full_like(condition_N, self.num_classes)])

    def macs(self) -> Macs:
        return self._macs

    def shape(self) -> dict[str, Any]:
        return {"architecture": "DiT", **asdict(self.config)}

    def fingerprint(self) -> Fingerprint:
        """That of our `DiT` with these weights; adapters are not looked at.

        Raises:
            ValueError: the blocks embed the timestep or the label differently.
        """
        if self.recorded_fingerprint:
            return self.recorded_fingerprint
        tensors = tensors_from_diffusers(self.config, base_parameters(self.transformer), _NAME)
        first = {
            name: torch.cat([piece.detach().flatten()[:FINGERPRINT_VALUES] for piece in pieces])
            for name, pieces in tensors.items()
        }
        return Fingerprint.of(first)
