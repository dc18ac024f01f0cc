"""A small random DiT and a random router for it: real ones, so that no test needs a stand-in."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from harmonica.core.artifact import RouterArtifact
from harmonica.evaluation.fashion_mnist import CLASS_NAMES
from harmonica.models.dit.model import DiT, DiTConfig
from harmonica.models.loading import ModelConfig, load_model, write_folder_config
from harmonica.samplers import Ddim, SamplerConfig

SHAPE = DiTConfig(
    sample_size=28,
    patch_size=4,
    in_channels=1,
    out_channels=1,
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=16,
    num_embeds_ada_norm=10,
)
SAMPLER = SamplerConfig(num_inference_steps=8)
HUGE = 1e30
"""Finite, but its square is beyond float32: attention of such queries and keys is NaN."""


def write_model(folder: Path, *, seed: int = 0, shape: DiTConfig = SHAPE) -> ModelConfig:
    """A model folder; `zero=False`, since a silent branch would make caching harmless."""
    folder.mkdir(parents=True, exist_ok=True)
    model = DiT(shape)
    model.initialize(torch.Generator().manual_seed(seed), zero=False)
    save_file(model.state_dict(), folder / "model.safetensors")
    write_folder_config(folder, shape, CLASS_NAMES)
    return ModelConfig(path=str(folder))


def write_overflowing(folder: Path) -> ModelConfig:
    """A model whose weights are all finite and whose output is not."""
    config, path = write_model(folder), folder / "model.safetensors"
    state = {name: value.clone() for name, value in load_file(path).items()}
    state["blocks.1.attn.qkv.weight"] *= HUGE
    path.unlink()
    save_file(state, path)
    return config


def make_artifact(model: ModelConfig, *, seed: int = 0) -> RouterArtifact:
    """A router that reuses about half of its entries."""
    denoiser = load_model(model).model
    shape = (SAMPLER.num_inference_steps, len(denoiser.branches))
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return RouterArtifact.build(logits, Ddim(denoiser, SAMPLER), threshold=0.5, reuse="hold", training={})
