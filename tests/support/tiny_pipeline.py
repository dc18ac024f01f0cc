"""A small random diffusers pipeline in the form of facebook/DiT-XL-2-256: transformer, VAE, scheduler."""

import json
from pathlib import Path

import torch

from harmonica.torchvision_ops import ensure_torchvision_imports

ensure_torchvision_imports()

from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel  # noqa: E402

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def make_transformer() -> DiTTransformer2DModel:
    """Thousand classes, as `DiTPipeline` has its null class fixed at number 1000."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, out_channels=8, num_layers=3, sample_size=8
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for block in transformer.transformer_blocks[1:]:  # every block of a public model has the same
        block.norm1.emb.load_state_dict(transformer.transformer_blocks[0].norm1.emb.state_dict())
    return transformer.eval()


def make_vae() -> AutoencoderKL:
    """Two pixels a latent along each side."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()


def write_pipeline(folder: Path, *, seed: int = 0) -> Path:
    """The folder, with ImageNet-like names of its first two classes."""
    torch.manual_seed(seed)
    names = {i: f"class {i}" for i in range(1000)} | {0: "tench, Tinca tinca", 1: "goldfish"}
    scheduler = DDIMScheduler(clip_sample=False, **LINEAR)
    DiTPipeline(make_transformer(), make_vae(), scheduler).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    # diffusers reads the names from there and does not write them.
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": names}))
    return folder
