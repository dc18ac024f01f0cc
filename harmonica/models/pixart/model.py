"""PixArt-alpha and -Sigma (arXiv 2310.00426, 2403.04692): diffusers' own module seen as branches.

Nothing is copied: the sub-layers are called where they lie, in the order of the module's own forward,
so weights and adapters are whatever the module has. Only cross-attention is put together here, from its
own projections: keys and values of the text are the same at every step.
Shapes: N batch, C channels, H W image, L tokens, D width, S text tokens, G blocks.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harmonica.models.base import BranchedTransformer, Fingerprint, Macs
from harmonica.models.text_blocks import (
    KINDS,
    Kind,
    PixArtConditioning,
    ProjectedText,
    arrange,
    linear_macs,
    run_all,
    split_heads,
    step_conditionings,
    sub_layers,
)
from harmonica.models.text_condition import TextCondition

if TYPE_CHECKING:  # seconds to import, and whoever has the module has imported it
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

FULL_PRECISION_PARTS = ("pos_embed.", "scale_shift_table", "proj_out.")
"""`PixArt.full_precision_parts` under diffusers' own names."""

# diffusers' own. Minus infinity would give NaN for a prompt that is nothing but padding.
_PADDING_SCORE = -10000.0
_PIXELS_PER_LATENT = 8  # of the VAE that every public PixArt was trained with
_CONFIG = (
    "sample_size",
    "patch_size",
    "in_channels",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "cross_attention_dim",
    "caption_channels",
    "attention_bias",
    "activation_fn",
    "norm_elementwise_affine",
    "norm_eps",
)


class PixArt(BranchedTransformer):
    """A `PixArtTransformer2DModel`; its condition is a `TextCondition`.

    In half precision, patches, positions, the residual stream and the output can stay in float32 as in
    `DiT`: whoever loads the module leaves `full_precision_parts` in it. A module that is all of one
    precision is computed in that, as by diffusers.
    """

    full_precision_parts = tuple(f"transformer.{part}" for part in FULL_PRECISION_PARTS)

    def __init__(
        self,
        transformer: "PixArtTransformer2DModel",
        *,
        text_tokens: int,
        cacheable: tuple[Kind, ...] = ("attn", "mlp"),
    ) -> None:
        """
        Args:
            text_tokens: S of the prompts that MACs are counted for; alpha's pipeline pads to 120, Sigma's
                to 300.
            cacheable: kinds of sub-layer that are branches. The others always run; their MACs are in
                `Macs.rest`.

        Raises:
            ValueError: no such kind, no text tokens, or a module without cross-attention.
        """
        super().__init__()
        config: Any = transformer.config
        if text_tokens < 1:
            raise ValueError(f"model.text_tokens is {text_tokens}: give the padded length of a prompt")
        if config.cross_attention_dim is None:
            raise ValueError(
                "model.path holds a transformer whose cross_attention_dim is None: give a PixArt, which "
                "attends to text"
            )
        self.transformer: Any = transformer  # as an nn.Module, its parts would be Tensor | Module
        self.text_tokens = text_tokens
        self.cacheable = tuple(kind for kind in KINDS if kind in cacheable)
        self.in_channels, self.out_channels = config.in_channels, transformer.out_channels
        self.sample_size, self.patch_size = config.sample_size, config.patch_size
        self.num_tokens = (self.sample_size // self.patch_size) ** 2
        layers = sub_layers(transformer, self.num_tokens, text_tokens)
        self._before, self.branches, self._uncached_macs = arrange(layers, cacheable)

    @property
    def repeated_layers(self) -> Sequence[nn.Module]:
        return [layer for block in self.transformer.transformer_blocks for layer in (block.attn1, block.ff)]

    def prepare(self, condition_N: TextCondition, timesteps: Sequence[float]) -> Sequence[PixArtConditioning]:
        return step_conditionings(self.project(condition_N), timesteps, self._modulations)

    def project(self, condition_N: TextCondition) -> ProjectedText:
        """What of the prompts no step changes. `embed` takes this too: once a trajectory is enough.

        Raises:
            ValueError: prompts of another text encoder, or no sizes where the model was trained with them.
        """
        model, dtype = self.transformer, self.dtype
        channels = model.config.caption_channels or model.config.cross_attention_dim
        if condition_N.embeddings.shape[-1] != channels:
            raise ValueError(
                f"condition.embeddings has width {condition_N.embeddings.shape[-1]} and the model takes "
                f"{channels}: use the text encoder that it was trained with"
            )
        if model.use_additional_conditions and condition_N.resolution is None:
            raise ValueError(
                "condition.resolution is None and the model has use_additional_conditions: give each row's "
                "height and width in pixels, and their aspect_ratio"
            )
        text_NSD = condition_N.embeddings.to(dtype)
        if model.caption_projection is not None:
            text_NSD = model.caption_projection(text_NSD)
        keys_values = [
            (split_heads(each.to_k(text_NSD), each.heads), split_heads(each.to_v(text_NSD), each.heads))
            for each in (block.attn2 for block in model.transformer_blocks)
        ]
        bias = (1 - condition_N.mask[:, None, None].to(dtype)) * _PADDING_SCORE
        sizes = {"resolution": condition_N.resolution, "aspect_ratio": condition_N.aspect_ratio}
        return ProjectedText(keys_values, bias, sizes)

    def embed(
        self,
        sample_NCHW: Tensor,
        timestep_N: Tensor,
        condition_N: TextCondition | ProjectedText | PixArtConditioning,
    ) -> tuple[Tensor, PixArtConditioning]:
        model = self.transformer
        height, width = sample_NCHW.shape[-2:]
        hidden = model.pos_embed(sample_NCHW.to(model.pos_embed.proj.weight.dtype))
        if isinstance(condition_N, TextCondition):
            condition_N = self.project(condition_N)
        if isinstance(condition_N, ProjectedText):
            condition_N = self._modulations(timestep_N, condition_N)
        conditioning = replace(condition_N, grid=(height // self.patch_size, width // self.patch_size))
        return run_all(self._before, hidden, conditioning), conditioning

    def _modulations(self, timestep_N: Tensor, text: ProjectedText) -> PixArtConditioning:
        """But for the grid, which the sample has."""
        model, n = self.transformer, len(timestep_N)
        modulation, time_ND = model.adaln_single(
            timestep_N, text.sizes, batch_size=n, hidden_dtype=self.dtype
        )
        tables_G6D = torch.stack([block.scale_shift_table for block in model.transformer_blocks])
        blocks = tables_G6D[:, None] + modulation.view(1, n, 6, -1)
        blocks[:, :, 1::3] += 1  # both scales, of all blocks at once
        shift, scale = (model.scale_shift_table + time_ND[:, None]).split(1, dim=1)
        return PixArtConditioning(blocks, (shift, 1 + scale), text)

    def head(self, hidden_NLD: Tensor, conditioning: PixArtConditioning) -> Tensor:
        shift, scale = conditioning.final
        (rows, columns), p = conditioning.grid, self.patch_size
        patches = self.transformer.proj_out(
            torch.addcmul(shift, self.transformer.norm_out(hidden_NLD), scale)
        )
        image = patches.reshape(-1, rows, columns, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(-1, self.out_channels, rows * p, columns * p)

    @property
    def value_shape(self) -> tuple[int, int]:
        return self.num_tokens, self.transformer.inner_dim

    def text_shape(self) -> tuple[int, int]:
        config = self.transformer.config
        return config.caption_channels or config.cross_attention_dim, self.text_tokens

    def told_pixels(self) -> tuple[int, int] | None:
        side = _PIXELS_PER_LATENT * self.sample_size
        return (side, side) if self.transformer.use_additional_conditions else None

    def guided_condition(self, condition_N: TextCondition) -> TextCondition:
        return condition_N.guided()

    def macs(self) -> Macs:
        """For `sample_size` squared and `text_tokens`; the text is projected at every step."""
        model = self.transformer
        embedders, attentions = model.adaln_single.emb, [block.attn2 for block in model.transformer_blocks]
        pixels = self.patch_size**2 * (self.in_channels + self.out_channels)
        rest = self._uncached_macs + self.num_tokens * pixels * model.inner_dim
        rest += linear_macs(embedders.timestep_embedder, model.adaln_single.linear)
        if model.use_additional_conditions:  # height and width go through one embedder
            rest += linear_macs(*[embedders.resolution_embedder] * 2, embedders.aspect_ratio_embedder)
        if model.caption_projection is not None:
            rest += self.text_tokens * linear_macs(model.caption_projection)
        rest += self.text_tokens * sum(linear_macs(each.to_k, each.to_v) for each in attentions)
        return Macs(tuple(branch.macs for branch in self.branches), rest)

    def fingerprint(self) -> Fingerprint:
        """Under diffusers' names: a module from a pipeline is the one that was loaded from its folder."""
        return self.recorded_fingerprint or Fingerprint.of(dict(self.transformer.named_parameters()))

    def shape(self) -> dict[str, Any]:
        model = self.transformer
        decided = {  # what a config may leave open
            "out_channels": self.out_channels,
            "interpolation_scale": model.pos_embed.interpolation_scale,
            "use_additional_conditions": model.use_additional_conditions,
        }
        own = {"cacheable": list(self.cacheable), "text_tokens": self.text_tokens}
        config = {name: model.config[name] for name in _CONFIG}
        return {"architecture": "PixArt", **config, **decided, **own}
