"""Sana (arXiv 2410.10629): diffusers' own module seen as branches.

Sana has flow matching, linear attention and Mix-FFN.
The sub-layers are called where they lie, in the order of the module's own forward. A block differs from
PixArt's in three things: its self-attention is linear, its MLP convolves, and both attentions may
normalise queries and keys.
Shapes: N batch, C channels, H W image, L tokens, D width, S text tokens, G blocks.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harmonica.models.base import Macs
from harmonica.models.text_blocks import (
    CrossAttention,
    Kind,
    ModulatedBranch,
    PixArtConditioning,
    ProjectedText,
    SubLayer,
)
from harmonica.models.text_transformer import TextTransformer
from harmonica.validation.extras import need

if TYPE_CHECKING:  # seconds to import, and whoever has the module has imported it
    from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel

FULL_PRECISION_PARTS = ("patch_embed.", "scale_shift_table", "proj_out.")
"""`Sana.full_precision_parts` under diffusers' own names."""
TEXT_TOKENS = 300
"""Padded length of a prompt in diffusers' pipeline."""


class _MixFfn(ModulatedBranch):
    """The MLP of one block, which convolves the tokens as an image."""

    def inputs(self, conditioning: PixArtConditioning) -> tuple[Any, ...]:
        return (*super().inputs(conditioning), conditioning.grid)

    def run(self, hidden_NLD: Tensor, *inputs: Any) -> Tensor:
        shift, scale, grid = inputs
        x_NLD = torch.addcmul(shift, self.block.norm2(hidden_NLD), scale).to(shift.dtype)
        output_NLD: Tensor = self.block.ff(x_NLD.mT.unflatten(2, grid)).flatten(2).mT
        return output_NLD


def _sub_layers(transformer: Any, tokens: int, text_tokens: int) -> Iterator[SubLayer]:
    """All of them in order, with their MACs."""
    for i, block in enumerate(transformer.transformer_blocks):
        own, text = block.attn1, block.attn2
        # For each head, (head + 1, L) by (L, head) and back: values with a row of ones, keys, queries.
        linear = 2 * own.inner_dim * (own.inner_dim // own.heads + 1)
        yield ModulatedBranch(
            i, "attn", block, tokens * (_weights(own.to_q, own.to_k, own.to_v, own.to_out) + linear)
        )
        looking = 2 * text_tokens * text.inner_dim
        yield CrossAttention(i, block, tokens * (_weights(text.to_q, text.to_out) + looking))
        yield _MixFfn(i, "mlp", block, tokens * _weights(block.ff))


def _weights(*modules: nn.Module) -> int:
    """Return MACs of all linear layers and convolutions inside, for one token."""
    layers = [layer for module in modules for layer in module.modules()]
    return sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d))


class Sana(TextTransformer):
    """A `SanaTransformer2DModel`; its condition is a `TextCondition`."""

    prediction = "flow"
    full_precision_parts = (
        "transformer.patch_embed.",
        "transformer.scale_shift_table",
        "transformer.proj_out.",
    )
    architecture = "Sana"
    config_names = (
        "sample_size",
        "patch_size",
        "in_channels",
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "num_cross_attention_heads",
        "cross_attention_head_dim",
        "cross_attention_dim",
        "caption_channels",
        "mlp_ratio",
        "attention_bias",
        "norm_elementwise_affine",
        "norm_eps",
        "interpolation_scale",
        "qk_norm",
        "timestep_scale",
    )

    def __init__(
        self,
        transformer: "SanaTransformer2DModel",
        *,
        text_tokens: int = TEXT_TOKENS,
        cacheable: tuple[Kind, ...] = ("attn", "mlp"),
    ) -> None:
        """Wrap diffusers' module, whose weights are shared.

        Args:
            text_tokens: S of the prompts that MACs are counted for.
            cacheable: kinds of sub-layer that are branches. The others always run; their MACs are in
                `Macs.rest`.

        Raises:
            ValueError: no such kind, no text tokens, or a module distilled with its guidance (Sana-Sprint).
        """
        config: Any = transformer.config
        if config.guidance_embeds:
            raise ValueError(
                "model.path holds a Sana-Sprint (guidance_embeds is True): give a Sana, which is guided by "
                "two passes"
            )
        super().__init__(
            transformer,
            out_channels=config.out_channels or config.in_channels,
            text_tokens=text_tokens,
            cacheable=cacheable,
        )

    @staticmethod
    def module_class() -> Any:
        need("diffusers", extra="diffusers")
        from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel

        return SanaTransformer2DModel

    @property
    def _patch_embed(self) -> Any:
        return self.transformer.patch_embed

    @property
    def _final_norm(self) -> Any:
        return self.transformer.norm_out.norm

    @property
    def _text_width(self) -> int:
        width: int = self.transformer.config.caption_channels
        return width

    def _sub_layers(self) -> Iterable[SubLayer]:
        return _sub_layers(self.transformer, self.num_tokens, self.text_tokens)

    def _embed_text(self, embeddings_NSC: Tensor) -> Tensor:
        text_NSD: Tensor = self.transformer.caption_norm(self.transformer.caption_projection(embeddings_NSC))
        return text_NSD

    def _embed_timestep(self, timestep_N: Tensor, text: ProjectedText) -> tuple[Tensor, Tensor]:
        """`timestep_N` is the scheduler's; the module's own differs by `timestep_scale`."""
        model = self.transformer
        embedded: tuple[Tensor, Tensor] = model.time_embed(
            timestep_N * model.config.timestep_scale, batch_size=len(timestep_N), hidden_dtype=self.dtype
        )
        return embedded

    @property
    def value_shape(self) -> tuple[int, int]:
        config = self.transformer.config
        return self.num_tokens, config.num_attention_heads * config.attention_head_dim

    def macs(self) -> Macs:
        """Return MACs for `sample_size` and `text_tokens`; every step projects the text."""
        model = self.transformer
        texts = [
            layer for block in model.transformer_blocks for layer in (block.attn2.to_k, block.attn2.to_v)
        ]
        rest = self._uncached_macs + self.num_tokens * _weights(model.patch_embed, model.proj_out)
        rest += _weights(model.time_embed) + self.text_tokens * _weights(model.caption_projection, *texts)
        return Macs(tuple(branch.macs for branch in self.branches), rest)
