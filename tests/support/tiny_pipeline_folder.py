"""A small random text-to-image pipeline's folder whose transformer has no branch file here: Chroma's, FLUX's
kind, with a T5 as its only encoder and a VAE."""

from pathlib import Path
from typing import Any

import torch
from tiny_text import make_encoder, make_tokenizer
from tiny_transformers import WIDTH, make_transformer

from harmonica.torchvision_ops import ensure_torchvision_imports

ensure_torchvision_imports()

from diffusers import AutoencoderKL, ChromaPipeline, FlowMatchEulerDiscreteScheduler  # noqa: E402

SIZE = 32
"""Height and width in pixels: 4 by 4 image tokens."""


def make_pipeline(*, seed: int = 0) -> Any:
    """Return the whole pipeline, in float32."""
    transformer = make_transformer("ChromaTransformer2DModel", seed=seed)
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=transformer.config.in_channels // 4,
        norm_num_groups=4,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    pipe = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=make_encoder(width=WIDTH, seed=seed),
        tokenizer=make_tokenizer(),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_pipeline_folder(folder: Path, *, seed: int = 0) -> Path:
    """As `save_pretrained` leaves it."""
    make_pipeline(seed=seed).save_pretrained(folder)
    return folder
