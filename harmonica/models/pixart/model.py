"""PixArt-alpha and -Sigma (arXiv 2310.00426, 2403.04692) seen as branches.

Shapes: N batch, L tokens, D width, S text tokens.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from harmonica.models.base import Macs
from harmonica.models.text_blocks import Kind, ProjectedText, SubLayer, linear_macs, sub_layers
from harmonica.models.text_condition import TextCondition
from harmonica.models.text_transformer import TextTransformer
from harmonica.validation.extras import need

if TYPE_CHECKING:  # seconds to import, and whoever has the module has imported it
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

FULL_PRECISION_PARTS = ("pos_embed.", "scale_shift_table", "proj_out.")
"""`PixArt.full_precision_parts` under diffusers' own names."""

_PIXELS_PER_LATENT = 8  # of the VAE that every public PixArt was trained with


class PixArt(TextTransformer):
    """A `PixArtTransformer2DModel`; its condition is a `TextCondition`."""

    full_precision_parts = (
        "transformer.pos_embed.",
        "transformer.scale_shift_table",
        "transformer.proj_out.",
    )
    architecture = "PixArt"
    config_names = (
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

    def __init__(
        self,
        transformer: "PixArtTransformer2DModel",
        *,
        text_tokens: int,
        cacheable: tuple[Kind, ...] = ("attn", "mlp"),
    ) -> None:
        """Wrap diffusers' module, whose weights are shared.

        Args:
            text_tokens: S of the prompts that MACs are counted for; alpha's pipeline pads to 120, Sigma's
                to 300.
            cacheable: kinds of sub-layer that are branches. The others always run; their MACs are in
                `Macs.rest`.

        Raises:
            ValueError: no such kind, no text tokens, or a module without cross-attention.
        """
        config: Any = transformer.config
        if config.cross_attention_dim is None:
            raise ValueError(
                "model.path holds a transformer whose cross_attention_dim is None: give a PixArt, which "
                "attends to text"
            )
        super().__init__(
            transformer,
            out_channels=transformer.out_channels,
            text_tokens=text_tokens,
            cacheable=cacheable,
        )

    @staticmethod
    def module_class() -> Any:
        need("diffusers", extra="diffusers")
        from diffusers import PixArtTransformer2DModel

        return PixArtTransformer2DModel

    @property
    def _patch_embed(self) -> Any:
        return self.transformer.pos_embed

    @property
    def _final_norm(self) -> Any:
        return self.transformer.norm_out

    @property
    def _text_width(self) -> int:
        config = self.transformer.config
        width: int = config.caption_channels or config.cross_attention_dim
        return width

    def _sub_layers(self) -> Iterable[SubLayer]:
        return sub_layers(self.transformer, self.num_tokens, self.text_tokens)

    def _embed_text(self, embeddings_NSC: Tensor) -> Tensor:
        projection = self.transformer.caption_projection
        return embeddings_NSC if projection is None else projection(embeddings_NSC)

    def _embed_timestep(self, timestep_N: Tensor, text: ProjectedText) -> tuple[Tensor, Tensor]:
        embedded: tuple[Tensor, Tensor] = self.transformer.adaln_single(
            timestep_N, text.sizes, batch_size=len(timestep_N), hidden_dtype=self.dtype
        )
        return embedded

    def _sizes(self, condition_N: TextCondition) -> dict[str, Tensor | None]:
        if self.transformer.use_additional_conditions and condition_N.resolution is None:
            raise ValueError(
                "condition.resolution is None and the model has use_additional_conditions: give each row's "
                "height and width in pixels, and their aspect_ratio"
            )
        return {"resolution": condition_N.resolution, "aspect_ratio": condition_N.aspect_ratio}

    @property
    def value_shape(self) -> tuple[int, int]:
        return self.num_tokens, self.transformer.inner_dim

    def size_conditioning(self) -> tuple[int, int] | None:
        side = _PIXELS_PER_LATENT * self.sample_size
        return (side, side) if self.transformer.use_additional_conditions else None

    def macs(self) -> Macs:
        """Return MACs for `sample_size` and `text_tokens`; every step projects the text."""
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

    def _decided(self) -> dict[str, Any]:
        model = self.transformer
        return {
            "out_channels": self.out_channels,
            "interpolation_scale": model.pos_embed.interpolation_scale,
            "use_additional_conditions": model.use_additional_conditions,
        }
