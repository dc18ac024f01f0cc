"""Adapt the transformers of diffusers' pipelines to their branches.

An adapter has all that `harmonica.apply` needs to know of an architecture: another one is one more class.
Shapes: N batch, C channels, H W image.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.integrations.pipeline_transformer import Call, PipelineTransformer
from harmonica.models.dit.diffusers_view import DiffusersDiT, base_parameters
from harmonica.models.fingerprint import Fingerprint
from harmonica.models.pixart.model import PixArt
from harmonica.models.sana.model import Sana
from harmonica.models.text_blocks import ProjectedText
from harmonica.models.text_condition import TextCondition

# They differ in speed alone, so it does not matter that PixArt's cross-attention is computed without them.
_EQUAL_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "SanaAttnProcessor2_0",
    "XFormersAttnProcessor",
)


class _PipelineDiT(PipelineTransformer):
    view: DiffusersDiT

    def __init__(self, transformer: Any, identity: dict[str, Any]) -> None:
        super().__init__(transformer)
        self.view = DiffusersDiT(transformer)

    def sources(self, arguments: dict[str, Any]) -> tuple[Tensor | None, ...]:
        return (arguments["class_labels"],)

    def raw_condition(self, arguments: dict[str, Any]) -> Tensor:
        labels_N: Tensor = arguments["class_labels"]
        return labels_N

    def bypassed(self) -> Iterator[tuple[str, nn.Module]]:
        for i, block in enumerate(self.transformer.transformer_blocks):
            yield f"transformer_blocks.{i}", block
            yield f"transformer_blocks.{i}.norm1", block.norm1
            if i:
                yield f"transformer_blocks.{i}.norm1.emb", block.norm1.emb

    def check(self) -> None:
        super().check()
        for i, block in enumerate(self.transformer.transformer_blocks):
            for name, module in block.norm1.emb.named_modules():
                if hasattr(module, "base_layer"):
                    raise ValueError(
                        f"transformer.transformer_blocks.{i}.norm1.emb.{name} has an adapter: timestep and "
                        "label are embedded once for all blocks, give adapters of other layers"
                    )

    def fingerprint(self) -> Fingerprint:
        return self.view.fingerprint()


class _PipelinePixArt(PipelineTransformer):
    view: PixArt | Sana
    view_class: type[PixArt | Sana] = PixArt

    def __init__(self, transformer: Any, identity: dict[str, Any]) -> None:
        super().__init__(transformer)
        # A router says what is a branch; another architecture's is refused by the check that follows.
        kinds, tokens = identity.get("cacheable", ("attn", "mlp")), identity.get("text_tokens", 1)
        self.view = self.view_class(transformer, text_tokens=tokens, cacheable=tuple(kinds))

    def sources(self, arguments: dict[str, Any]) -> tuple[Tensor | None, ...]:
        if arguments["attention_mask"] is not None:
            raise ValueError("attention_mask is given: under a plan all image tokens see all, leave it out")
        sizes = arguments.get("added_cond_kwargs") or {}
        text, mask = arguments["encoder_hidden_states"], arguments["encoder_attention_mask"]
        return text, mask, sizes.get("resolution"), sizes.get("aspect_ratio")

    def raw_condition(self, arguments: dict[str, Any]) -> TextCondition:
        text, mask, resolution, aspect_ratio = self.sources(arguments)
        assert text is not None, "the forwards of diffusers require encoder_hidden_states"
        if mask is not None and mask.ndim != 2:
            raise ValueError(
                f"encoder_attention_mask has shape {tuple(mask.shape)}: under a plan give the mask "
                "itself (N, S), 1 at words and 0 at padding"
            )
        return TextCondition(
            embeddings=text,
            mask=text.new_ones(text.shape[:2], dtype=torch.bool) if mask is None else mask.bool(),
            resolution=resolution,
            aspect_ratio=aspect_ratio,
        )

    def project(self, raw_N: TextCondition) -> ProjectedText:
        return self.view.project(raw_N)

    def fingerprint(self) -> Fingerprint:
        return Fingerprint.of(base_parameters(self.transformer))

    def bypassed(self) -> Iterator[tuple[str, nn.Module]]:
        for i, block in enumerate(self.transformer.transformer_blocks):
            yield f"transformer_blocks.{i}", block
            yield f"transformer_blocks.{i}.attn2", block.attn2

    def check(self) -> None:
        super().check()
        for i, block in enumerate(self.transformer.transformer_blocks):
            name = type(block.attn2.processor).__name__
            if name not in _EQUAL_PROCESSORS:
                raise ValueError(
                    f"transformer.transformer_blocks.{i}.attn2 has the attention processor {name}, which a "
                    "plan does not call: transformer.set_default_attn_processor(), or harmonica.remove first"
                )


class _PipelineSana(_PipelinePixArt):
    view_class = Sana
    processor_arguments = "attention_kwargs"

    def read(self, *args: Any, **kwargs: Any) -> Call:
        call = super().read(*args, **kwargs)  # whose timestep the pipeline has scaled
        scale = self.transformer.config.timestep_scale
        given_N = call.given_timestep_N / scale
        return replace(call, timestep_N=call.timestep_N / scale, given_timestep_N=given_N)

    def sources(self, arguments: dict[str, Any]) -> tuple[Tensor | None, ...]:
        # The scale of adapters is set by the very forward that a plan replaces.
        for name in ("guidance", "controlnet_block_samples", "attention_kwargs"):
            if arguments[name] is not None:
                raise ValueError(f"{name} is given: the branches do not take it, leave it out")
        return super().sources(arguments)

    def bypassed(self) -> Iterator[tuple[str, nn.Module]]:
        yield from super().bypassed()
        yield "norm_out", self.transformer.norm_out


_KNOWN: dict[str, Callable[[Any, dict[str, Any]], PipelineTransformer]] = {
    "DiTTransformer2DModel": _PipelineDiT,
    "PixArtTransformer2DModel": _PipelinePixArt,
    "SanaTransformer2DModel": _PipelineSana,
}


def pipeline_transformer(transformer: nn.Module, identity: dict[str, Any]) -> PipelineTransformer:
    """Return the adapter of a transformer by its class.

    Args:
        identity: of the model that the router was made for; it says what is a branch.

    Raises:
        ValueError: another class, or one whose configuration has no branch view.
    """
    name = type(transformer).__name__
    if name not in _KNOWN:
        raise ValueError(
            f"transformer is a {name}: give pipe.transformer, a {' or '.join(_KNOWN)} (of a PeftModel, its "
            "get_base_model())"
        )
    return _KNOWN[name](transformer, identity)
