"""Conversion between our names and those of diffusers' `DiTTransformer2DModel`.

The weights are those of the public code, rearranged: q, k and v lie apart, every block carries a copy
of the one timestep and label embedder, and the fixed positions are left out. The function is another:
diffusers spaces the timestep frequencies by half - 1 (`downscale_freq_shift` 1), the public code by half.
"""

from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from harmonica.io.safe_load import check_state
from harmonica.models.dit.config import DiTConfig
from harmonica.models.dit.stored import POSITIONS, StoredModel, skeleton

CLASS_NAME = "DiTTransformer2DModel"
_CLASS_NAMES = (CLASS_NAME, "Transformer2DModel")  # the second is what facebook/DiT-XL-2-256 was saved as

_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}  # the one value of each that is a DiT, and diffusers' default
_SHAPE = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}  # with diffusers' defaults, for what a config.json leaves out

_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_EMBEDDER = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_BLOCK = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}

# Saved by some versions of diffusers, made anew from the shape by all.
_IGNORED = ("pos_embed.pos_embed",)


def config_from_diffusers(config: Mapping[str, Any], source: str) -> DiTConfig:
    """Convert a transformer's `config.json` to our configuration.

    Raises:
        ValueError: another class, or a setting that makes it no DiT; names the field.
    """
    if config.get("_class_name") not in _CLASS_NAMES:
        raise ValueError(
            f"{source}: config.json is of {config.get('_class_name')}: give a folder of {CLASS_NAME}"
        )
    for name, only in _FIXED.items():
        if config.get(name, only) != only:
            raise ValueError(f"{source}: {name} is {config[name]!r}: give a transformer with {only!r}")
    values = {name: config.get(name, default) for name, default in _SHAPE.items()}
    out_channels = config.get("out_channels")
    try:
        return DiTConfig(
            **values,
            out_channels=values["in_channels"] if out_channels is None else out_channels,
            downscale_freq_shift=1,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def config_to_diffusers(config: DiTConfig) -> dict[str, Any]:
    """Return the transformer's `config.json`; diffusers applies its own convention."""
    return {
        "_class_name": CLASS_NAME,
        "_diffusers_version": metadata.version("diffusers"),
        **_FIXED,
        **{name: getattr(config, name) for name in _SHAPE},
        "out_channels": config.out_channels,
        "dropout": 0.0,
        "norm_num_groups": 32,
        "upcast_attention": False,
    }


def _diffusers_keys(name: str, num_layers: int) -> list[tuple[str, ...]]:
    """Return the keys of our tensor `name`: equal copies, each the names of its rows."""
    module, _, leaf = name.rpartition(".")
    if module in _OUTER:
        return [(f"{_OUTER[module]}.{leaf}",)]
    if module in _EMBEDDER:
        return [(f"transformer_blocks.{i}.norm1.emb.{_EMBEDDER[module]}.{leaf}",) for i in range(num_layers)]
    _, index, part = module.split(".", 2)
    return [tuple(f"transformer_blocks.{index}.{piece}.{leaf}" for piece in _BLOCK[part])]


def tensors_from_diffusers(
    config: DiTConfig, state: Mapping[str, Tensor], source: str
) -> dict[str, tuple[Tensor, ...]]:
    """Return a transformer's weights by our names; nothing is copied.

    Raises:
        ValueError: keys or shapes are not those of the configuration, in diffusers' names, or the blocks
            embed the timestep or the label differently.
    """
    state = {name: value for name, value in state.items() if name not in _IGNORED}
    own = dict(skeleton(config).named_parameters())
    keys = {name: _diffusers_keys(name, config.num_layers) for name in own}
    wanted = {
        piece: value
        for name, copies in keys.items()
        for copy in copies
        for piece, value in zip(copy, own[name].chunk(len(copy)))
    }
    check_state(wanted, state, source)
    for copies in keys.values():
        for copy in copies[1:]:
            if not torch.equal(state[copy[0]], state[copies[0][0]]):
                raise ValueError(
                    f"{source}: {copy[0]} is not that of block 0: a DiT embeds timestep and label once for "
                    "all blocks, give a model whose blocks share them"
                )
    return {name: tuple(state[piece] for piece in copies[0]) for name, copies in keys.items()}


def tensors_to_diffusers(stored: StoredModel) -> dict[str, Tensor]:
    """Return the transformer's state dict in the stored precision.

    Raises:
        ValueError: the positions are not the fixed ones, which diffusers would put in their place.
    """
    if POSITIONS in stored.tensors:
        _check_positions(stored)
    state = {}
    for name in stored.tensors:
        if name == POSITIONS:
            continue
        tensor = stored.tensor(name)
        for number, copy in enumerate(_diffusers_keys(name, stored.config.num_layers)):
            for piece, rows in zip(copy, tensor.chunk(len(copy))):
                state[piece] = rows.clone() if number else rows  # safetensors refuses shared memory
    return state


def _check_positions(stored: StoredModel) -> None:
    fixed = StoredModel(config=stored.config, tensors={}, class_names=()).positions()
    worst = (stored.positions().float() - fixed).abs().max().item()
    if not worst < 1e-2:  # half precision rounds by up to 4e-3
        raise ValueError(
            f"{POSITIONS} is up to {worst:.2g} away from the sine-cosine table that diffusers makes itself: "
            "this model has no diffusers form, give one with the public positions"
        )
