"""Record the branches of FLUX.1-dev and Wan 2.1 from their configurations.

The forward runs on `torch.device("meta")`, where nothing is computed; its MACs are those that
`harmonica.integrations.recorded` counts for a router.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from harmonica.integrations.recorded.block_stack import record_blocks
from harmonica.integrations.recorded.branches import BlockGraph
from harmonica.integrations.recorded.kinds import KINDS, are_all_blocks
from harmonica.integrations.recorded.recording import record
from harmonica.models.base import Macs
from harmonica.torchvision_ops import ensure_torchvision_imports
from harmonica.training.memory_model import Shape
from harmonica.training.sharding import sharded_layers
from harmonica.validation.settings import SettingError

from .sizes import Size, SizedModel, prompt_bytes

_VALUE_BYTES, _VAE_SCALE = 2, 8


@dataclass(frozen=True, slots=True)
class _Recorded:
    """One recorded forward of a transformer: its costs for a row, and its weights."""

    macs: Macs
    sub_layers: int
    """Number of attention and feed-forward modules that it runs."""
    sharded: int
    """Bytes of the weights that sharding spreads."""
    other: int
    """Bytes of the other weights."""

    @classmethod
    def of(cls, module: Any, cacheable: Sequence[str], **inputs: Any) -> "_Recorded":
        """Record a forward.

        Args:
            module: a transformer of diffusers on `torch.device("meta")`.
            cacheable: what is a branch, as in `harmonica.train_pipeline`.
            inputs: of its forward, for one row.
        """
        by_modules = graph = BlockGraph(record(module.eval(), module.forward, **inputs))
        if are_all_blocks(cacheable):
            graph = BlockGraph(record_blocks(module, module.forward, **inputs))
        macs, sub_layers = graph.macs_of(graph.chosen(cacheable)), by_modules.chosen(KINDS)
        weights = sum(p.numel() for p in module.parameters()) * _VALUE_BYTES
        layers = sharded_layers(module)
        sharded = sum(p.numel() for layer in layers for p in layer.parameters()) * _VALUE_BYTES
        return cls(macs, len(sub_layers), sharded, weights - sharded)


def _latent(size: Size, patch: int) -> tuple[int, int]:
    """Return height and width of the latents.

    Raises:
        SettingError: they are no whole number of patches.
    """
    unit = _VAE_SCALE * patch
    for field, pixels in (("height", size.height), ("width", size.width)):
        if pixels % unit:
            raise SettingError(f"{field} is {pixels}: give a multiple of {unit} for this model")
    return size.height // _VAE_SCALE, size.width // _VAE_SCALE


def flux(name: str, size: Size, config: Mapping[str, Any], cacheable: Sequence[str]) -> SizedModel:
    """Return FLUX.1-dev with 512 text tokens.

    Its guidance is distilled, so that an image is one row.

    By sub-modules, its single-stream blocks keep one value for attention and feed-forward together.
    """
    ensure_torchvision_imports()
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    height, width = _latent(size, 2)
    image, text = height * width // 4, 512
    with torch.device("meta"):
        module = FluxTransformer2DModel.from_config({"guidance_embeds": True, **config})
        found = _Recorded.of(
            module,
            cacheable,
            hidden_states=torch.empty(1, image, module.config.in_channels),
            encoder_hidden_states=torch.empty(1, text, module.config.joint_attention_dim),
            pooled_projections=torch.empty(1, module.config.pooled_projection_dim),
            timestep=torch.empty(1),
            img_ids=torch.empty(image, 3),
            txt_ids=torch.empty(text, 3),
            guidance=torch.empty(1),
        )
    heads = module.config.num_attention_heads
    double = Shape(
        kinds=("attn", "mlp"),
        cacheable=("attn", "mlp"),
        layers=module.config.num_layers,
        width=heads * module.config.attention_head_dim,
        heads=heads,
        tokens=image + text,
        text_tokens=0,
        value_bytes=_VALUE_BYTES,
        hidden_bytes=_VALUE_BYTES,
        sharded_weights=found.sharded,
        other_weights=found.other,
        are_one_branch=are_all_blocks(cacheable),
    )
    single = replace(double, layers=module.config.num_single_layers, sharded_weights=0, other_weights=0)
    shapes: tuple[Shape, ...] = (double, replace(single, cacheable=("mlp",)))
    if double.are_one_branch:  # their blocks differ in nothing that counts
        shapes = (replace(double, layers=double.layers + single.layers),)
    return SizedModel(
        name=name,
        size=size,
        macs=found.macs,
        sub_layers=found.sub_layers,
        shapes=shapes,
        num_steps=28,
        is_guided=False,
        sample_bytes=4 * 16 * height * width + prompt_bytes(text) + 2 * module.config.pooled_projection_dim,
        is_recorded=True,
    )


def wan(name: str, size: Size, config: Mapping[str, Any], cacheable: Sequence[str]) -> SizedModel:
    """Return Wan 2.1, the one of 14B, with two rows a video.

    There is a latent frame for every four.
    """
    ensure_torchvision_imports()
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    height, width = _latent(size, 2)
    if size.frames % 4 != 1:
        raise SettingError(f"frames is {size.frames}: give a multiple of 4 and one more for this model")
    frames, text = (size.frames - 1) // 4 + 1, 512
    with torch.device("meta"):
        module = WanTransformer3DModel.from_config(dict(config))
        found = _Recorded.of(
            module,
            cacheable,
            hidden_states=torch.empty(1, module.config.in_channels, frames, height, width),
            timestep=torch.empty(1),
            encoder_hidden_states=torch.empty(1, text, module.config.text_dim),
        )
    heads, kinds = module.config.num_attention_heads, ("attn", "cross", "mlp")
    shape = Shape(
        kinds=kinds,
        cacheable=kinds,
        layers=module.config.num_layers,
        width=heads * module.config.attention_head_dim,
        heads=heads,
        tokens=frames * height * width // 4,
        text_tokens=text,
        value_bytes=_VALUE_BYTES,
        hidden_bytes=_VALUE_BYTES,
        sharded_weights=found.sharded,
        other_weights=found.other,
        are_one_branch=are_all_blocks(cacheable),
    )
    return SizedModel(
        name=name,
        size=size,
        macs=found.macs,
        sub_layers=found.sub_layers,
        shapes=(shape,),
        num_steps=50,
        is_guided=True,
        sample_bytes=4 * math.prod((16, frames, height, width)) + prompt_bytes(text),
        is_recorded=True,
    )
