"""Sana (arXiv 2410.10629): diffusers' own module seen as branches; flow matching, linear attention, Mix-FFN.

The sub-layers are called where they lie, in the order of the module's own forward. A block differs from
PixArt's in three things: its self-attention is linear, its MLP convolves, and both attentions may
normalise queries and keys.
Shapes: N batch, C channels, H W image, L tokens, D width, S text tokens, G blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harmonica.models.base import BranchedTransformer, Fingerprint, Macs
from harmonica.models.text_blocks import (
    KINDS,
    CrossAttention,
    Kind,
    ModulatedBranch,
    PixArtConditioning,
    ProjectedText,
    SubLayer,
    arrange,
    run_all,
    split_heads,
    step_conditionings,
)
from harmonica.models.text_condition import TextCondition

if TYPE_CHECKING:  # seconds to import, and whoever has the module has imported it
    from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel

FULL_PRECISION_PARTS = ("patch_embed.", "scale_shift_table", "proj_out.")
"""`Sana.full_precision_parts` under diffusers' own names."""
TEXT_TOKENS = 300
"""Padded length of a prompt in diffusers' pipeline."""

_PADDING_SCORE = -10000.0  # diffusers' own
_CONFIG = (
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


class _MixFfn(ModulatedBranch):
    """The MLP of one block, which convolves the tokens as a picture."""

    def compute(self, hidden_NLD: Tensor, conditioning: PixArtConditioning) -> Tensor:
        shift, scale = conditioning.blocks[self.index, :, 3:5].split(1, dim=1)
        x_NLD = torch.addcmul(shift, self.block.norm2(hidden_NLD), scale).to(shift.dtype)
        return self.block.ff(x_NLD.mT.unflatten(2, conditioning.grid)).flatten(2).mT


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
    """Of all linear layers and convolutions inside: their MACs for one token."""
    layers = [layer for module in modules for layer in module.modules()]
    return sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d))


class Sana(BranchedTransformer):
    """A `SanaTransformer2DModel`; its condition is a `TextCondition`. Precisions are as in `PixArt`."""

    prediction = "flow"
    full_precision_parts = tuple(f"transformer.{part}" for part in FULL_PRECISION_PARTS)

    def __init__(
        self,
        transformer: "SanaTransformer2DModel",
        *,
        text_tokens: int = TEXT_TOKENS,
        cacheable: tuple[Kind, ...] = ("attn", "mlp"),
    ) -> None:
        """
        Args:
            text_tokens: S of the prompts that MACs are counted for.
            cacheable: kinds of sub-layer that are branches. The others always run; their MACs are in
                `Macs.rest`.

        Raises:
            ValueError: no such kind, no text tokens, or a module distilled with its guidance (Sana-Sprint).
        """
        super().__init__()
        config: Any = transformer.config
        if text_tokens < 1:
            raise ValueError(f"model.text_tokens is {text_tokens}: give the padded length of a prompt")
        if config.guidance_embeds:
            raise ValueError(
                "model.path holds a Sana-Sprint (guidance_embeds is True): give a Sana, which is guided by "
                "two passes"
            )
        self.transformer: Any = transformer  # as an nn.Module, its parts would be Tensor | Module
        self.text_tokens = text_tokens
        self.cacheable = tuple(kind for kind in KINDS if kind in cacheable)
        self.in_channels, self.out_channels = config.in_channels, config.out_channels or config.in_channels
        self.sample_size, self.patch_size = config.sample_size, config.patch_size
        self.num_tokens = (self.sample_size // self.patch_size) ** 2
        layers = _sub_layers(transformer, self.num_tokens, text_tokens)
        self._before, self.branches, self._uncached_macs = arrange(layers, cacheable)

    def prepare(self, condition_N: TextCondition, timesteps: Sequence[float]) -> Sequence[PixArtConditioning]:
        return step_conditionings(self.project(condition_N), timesteps, self._modulations)

    def project(self, condition_N: TextCondition) -> ProjectedText:
        """What of the prompts no step changes. `embed` takes this too: once a trajectory is enough.

        Raises:
            ValueError: prompts of another text encoder.
        """
        model, dtype = self.transformer, self.dtype
        if condition_N.embeddings.shape[-1] != model.config.caption_channels:
            raise ValueError(
                f"condition.embeddings has width {condition_N.embeddings.shape[-1]} and the model takes "
                f"{model.config.caption_channels}: use the text encoder that it was trained with"
            )
        text_NSD = model.caption_norm(model.caption_projection(condition_N.embeddings.to(dtype)))
        keys_values = []
        for each in (block.attn2 for block in model.transformer_blocks):
            key_NSD = each.to_k(text_NSD) if each.norm_k is None else each.norm_k(each.to_k(text_NSD))
            keys_values.append(
                (split_heads(key_NSD, each.heads), split_heads(each.to_v(text_NSD), each.heads))
            )
        bias = (1 - condition_N.mask[:, None, None].to(dtype)) * _PADDING_SCORE
        return ProjectedText(keys_values, bias, {})

    def embed(
        self,
        sample_NCHW: Tensor,
        timestep_N: Tensor,
        condition_N: TextCondition | ProjectedText | PixArtConditioning,
    ) -> tuple[Tensor, PixArtConditioning]:
        """`timestep_N` is the scheduler's; the module's own differs by `timestep_scale`."""
        model = self.transformer
        height, width = sample_NCHW.shape[-2:]
        hidden = model.patch_embed(sample_NCHW.to(model.patch_embed.proj.weight.dtype))
        if isinstance(condition_N, TextCondition):
            condition_N = self.project(condition_N)
        if isinstance(condition_N, ProjectedText):
            condition_N = self._modulations(timestep_N, condition_N)
        conditioning = replace(condition_N, grid=(height // self.patch_size, width // self.patch_size))
        return run_all(self._before, hidden, conditioning), conditioning

    def _modulations(self, timestep_N: Tensor, text: ProjectedText) -> PixArtConditioning:
        """But for the grid, which the sample has."""
        model, n = self.transformer, len(timestep_N)
        modulation, time_ND = model.time_embed(
            timestep_N * model.config.timestep_scale, batch_size=n, hidden_dtype=self.dtype
        )
        tables_G6D = torch.stack([block.scale_shift_table for block in model.transformer_blocks])
        blocks = tables_G6D[:, None] + modulation.view(1, n, 6, -1)
        blocks[:, :, 1::3] += 1  # both scales, of all blocks at once
        shift, scale = (model.scale_shift_table + time_ND[:, None]).split(1, dim=1)
        return PixArtConditioning(blocks, (shift, 1 + scale), text)

    def head(self, hidden_NLD: Tensor, conditioning: PixArtConditioning) -> Tensor:
        model, (shift, scale) = self.transformer, conditioning.final
        (rows, columns), p = conditioning.grid, self.patch_size
        patches = model.proj_out(torch.addcmul(shift, model.norm_out.norm(hidden_NLD), scale))
        image = patches.reshape(-1, rows, columns, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(-1, self.out_channels, rows * p, columns * p)

    @property
    def value_shape(self) -> tuple[int, int]:
        config = self.transformer.config
        return self.num_tokens, config.num_attention_heads * config.attention_head_dim

    def text_shape(self) -> tuple[int, int]:
        return self.transformer.config.caption_channels, self.text_tokens

    def guided_condition(self, condition_N: TextCondition) -> TextCondition:
        return condition_N.guided()

    def macs(self) -> Macs:
        """For `sample_size` squared and `text_tokens`; the text is projected at every step."""
        model = self.transformer
        texts = [
            layer for block in model.transformer_blocks for layer in (block.attn2.to_k, block.attn2.to_v)
        ]
        rest = self._uncached_macs + self.num_tokens * _weights(model.patch_embed, model.proj_out)
        rest += _weights(model.time_embed) + self.text_tokens * _weights(model.caption_projection, *texts)
        return Macs(tuple(branch.macs for branch in self.branches), rest)

    def fingerprint(self) -> Fingerprint:
        """Under diffusers' names: a module from a pipeline is the one that was loaded from its folder."""
        return self.recorded_fingerprint or Fingerprint.of(dict(self.transformer.named_parameters()))

    def shape(self) -> dict[str, Any]:
        own = {"out_channels": self.out_channels, "cacheable": list(self.cacheable)}
        config = {name: self.transformer.config[name] for name in _CONFIG}
        return {"architecture": "Sana", **config, **own, "text_tokens": self.text_tokens}
