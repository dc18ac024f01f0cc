"""The base of PixArt and Sana: diffusers' own module seen as branches.

Nothing is copied: the sub-layers are called where they lie, in the order of the module's own forward,
so weights and adapters are whatever the module has. Only cross-attention is put together here, from its
own projections: keys and values of the text are the same at every step.
Shapes: N batch, C channels, H W image, L tokens, D width, S text tokens, G blocks.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from harmonica.models.base import BranchedTransformer, run_all, unpatchify
from harmonica.models.fingerprint import Fingerprint
from harmonica.models.text_blocks import (
    KINDS,
    Kind,
    PixArtConditioning,
    ProjectedText,
    SubLayer,
    arrange,
    split_heads,
    step_conditionings,
)
from harmonica.models.text_condition import TextCondition

# diffusers' own. Minus infinity would give NaN for a prompt that is nothing but padding.
_PADDING_SCORE = -10000.0


class TextTransformer(BranchedTransformer):
    """A diffusers transformer of adaLN-single blocks that takes a `TextCondition`.

    In half precision, patches, positions, the residual stream and the output can stay in float32 as in
    `DiT`: whoever loads the module leaves `full_precision_parts` in it. A module that is all of one
    precision is computed in that, as by diffusers.
    """

    architecture: ClassVar[str]
    """The name that `shape` and with it an artifact has."""
    config_names: ClassVar[tuple[str, ...]]
    """Settings of the module's configuration that are part of `shape`."""

    def __init__(
        self, transformer: Any, *, out_channels: int, text_tokens: int, cacheable: tuple[Kind, ...]
    ) -> None:
        """Find the module's branches and count their MACs.

        Args:
            text_tokens: S of the prompts that MACs are counted for.
            cacheable: kinds of sub-layer that are branches. The others always run; their MACs are in
                `Macs.rest`.

        Raises:
            ValueError: no such kind, or no text tokens.
        """
        super().__init__()
        if text_tokens < 1:
            raise ValueError(f"model.text_tokens is {text_tokens}: give the padded length of a prompt")
        config = transformer.config
        self.transformer: Any = transformer  # as an nn.Module, its parts would be Tensor | Module
        self.text_tokens = text_tokens
        self.cacheable = tuple(kind for kind in KINDS if kind in cacheable)
        self.in_channels, self.out_channels = config.in_channels, out_channels
        self.sample_size, self.patch_size = config.sample_size, config.patch_size
        self.num_tokens = (self.sample_size // self.patch_size) ** 2
        self._before, self.branches, self._uncached_macs = arrange(self._sub_layers(), cacheable)

    @staticmethod
    @abstractmethod
    def module_class() -> Any:
        """Import the class of diffusers that the module has."""

    @property
    @abstractmethod
    def _patch_embed(self) -> Any:
        """The layer from the sample to tokens."""

    @property
    @abstractmethod
    def _final_norm(self) -> Any:
        """The norm before the last modulation."""

    @property
    @abstractmethod
    def _text_width(self) -> int:
        """The width of the text encoder's embeddings."""

    @abstractmethod
    def _sub_layers(self) -> Iterable[SubLayer]:
        """All sub-layers of the blocks in order, with their MACs."""

    @abstractmethod
    def _embed_text(self, embeddings_NSC: Tensor) -> Tensor:
        """Project the text encoder's embeddings to what keys and values are made of."""

    @abstractmethod
    def _embed_timestep(self, timestep_N: Tensor, text: ProjectedText) -> tuple[Tensor, Tensor]:
        """Return a block's six modulations (N, 6 D) and the embedded timestep (N, D)."""

    def _decided(self) -> dict[str, Any]:
        """Return the part of `shape` that a configuration may leave open."""
        return {"out_channels": self.out_channels}

    def _sizes(self, condition_N: TextCondition) -> dict[str, Tensor | None]:
        """The picture's sizes as the module takes them.

        Raises:
            ValueError: they are missing in the condition.
        """
        return {}

    def prepare(self, condition_N: TextCondition, timesteps: Sequence[float]) -> Sequence[PixArtConditioning]:
        return step_conditionings(self.project(condition_N), timesteps, self._modulations)

    def project(self, condition_N: TextCondition) -> ProjectedText:
        """Project the prompts, once a trajectory: `embed` takes the result at every step.

        Raises:
            ValueError: prompts of another text encoder, or no sizes where the model was trained with them.
        """
        dtype = self.dtype
        if condition_N.embeddings.shape[-1] != self._text_width:
            raise ValueError(
                f"condition.embeddings has width {condition_N.embeddings.shape[-1]} and the model takes "
                f"{self._text_width}: use the text encoder that it was trained with"
            )
        sizes = self._sizes(condition_N)
        text_NSD = self._embed_text(condition_N.embeddings.to(dtype))
        keys_values = []
        for each in (block.attn2 for block in self.transformer.transformer_blocks):
            key_NSD = each.to_k(text_NSD)
            if each.norm_k is not None:  # Sana's; no PixArt has one
                key_NSD = each.norm_k(key_NSD)
            keys_values.append(
                (split_heads(key_NSD, each.heads), split_heads(each.to_v(text_NSD), each.heads))
            )
        bias = (1 - condition_N.mask[:, None, None].to(dtype)) * _PADDING_SCORE
        return ProjectedText(keys_values, bias, sizes)

    def embed(
        self,
        sample_NCHW: Tensor,
        timestep_N: Tensor,
        condition_N: TextCondition | ProjectedText | PixArtConditioning,
    ) -> tuple[Tensor, PixArtConditioning]:
        height, width = sample_NCHW.shape[-2:]
        hidden = self.as_residual(self._patch_embed(sample_NCHW.to(self._patch_embed.proj.weight.dtype)))
        if isinstance(condition_N, TextCondition):
            condition_N = self.project(condition_N)
        if isinstance(condition_N, ProjectedText):
            condition_N = self._modulations(timestep_N, condition_N)
        conditioning = replace(condition_N, grid=(height // self.patch_size, width // self.patch_size))
        return run_all(self._before, hidden, conditioning), conditioning

    def _modulations(self, timestep_N: Tensor, text: ProjectedText) -> PixArtConditioning:
        """Compute the conditioning of one step, without the grid, which the sample has."""
        model = self.transformer
        modulation, time_ND = self._embed_timestep(timestep_N, text)
        tables_G6D = torch.stack([block.scale_shift_table for block in model.transformer_blocks])
        blocks = tables_G6D[:, None] + modulation.view(1, len(timestep_N), 6, -1)
        blocks[:, :, 1::3] += 1  # both scales, of all blocks at once
        shift, scale = (model.scale_shift_table + time_ND[:, None]).split(1, dim=1)
        return PixArtConditioning(blocks, (shift, 1 + scale), text)

    def head(self, hidden_NLD: Tensor, conditioning: PixArtConditioning) -> Tensor:
        shift, scale = conditioning.final
        normed = self._final_norm(hidden_NLD.to(shift.dtype))
        patches = self.transformer.proj_out(torch.addcmul(shift, normed, scale))
        return unpatchify(patches, conditioning.grid, self.patch_size)

    def text_shape(self) -> tuple[int, int]:
        return self._text_width, self.text_tokens

    def guided_condition(self, condition_N: TextCondition) -> TextCondition:
        return condition_N.guided()

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint under diffusers' names, as for a pipeline's own module."""
        return self.recorded_fingerprint or Fingerprint.of(dict(self.transformer.named_parameters()))

    def shape(self) -> dict[str, Any]:
        own = {"cacheable": list(self.cacheable), "text_tokens": self.text_tokens}
        config = {name: self.transformer.config[name] for name in self.config_names}
        return {"architecture": self.architecture, **config, **self._decided(), **own}
