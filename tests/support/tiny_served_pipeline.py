"""Folders of small random FLUX pipelines, whole, and routers that were trained in them."""

from pathlib import Path

import tiny_transformers
import torch
from diffusers import AutoencoderKL, FluxKontextPipeline, FluxPipeline
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from tiny_text import make_encoder, make_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

import harmonica
from harmonica.core.artifact import RouterArtifact
from harmonica.training.config import TrainingConfig

STEPS = 4
WIDTH, HEIGHT = 128, 64
"""Of what is trained with."""
MULTIPLE = 64


def _make_vae() -> AutoencoderKL:
    """32 pixels a latent along each side, so that FLUX Kontext's megapixel is 256 tokens."""
    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(8,) * 6,
        down_block_types=("DownEncoderBlock2D",) * 6,
        up_block_types=("UpDecoderBlock2D",) * 6,
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=0.1,
    )
    return vae.eval()


def _make_clip() -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=len(make_tokenizer()),
        hidden_size=tiny_transformers.WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=1,
    )
    return CLIPTextModel(config).eval()


def write_flux(folder: Path, *, kontext: bool = False, seed: int = 0) -> Path:
    """A pipeline as `save_pretrained` leaves it."""
    transformer = tiny_transformers.make_transformer("FluxTransformer2DModel", seed=seed)
    tokenizers = [make_tokenizer() for _ in range(2)]
    for tokenizer in tokenizers:
        tokenizer.model_max_length = 16
    (FluxKontextPipeline if kontext else FluxPipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=_wide(transformer, seed),
        vae=_make_vae(),
        text_encoder=_make_clip(),
        tokenizer=tokenizers[0],
        text_encoder_2=make_encoder(width=tiny_transformers.WIDTH),
        tokenizer_2=tokenizers[1],
    ).save_pretrained(folder)
    return folder


def _wide(transformer: torch.nn.Module, seed: int) -> torch.nn.Module:
    """With the channels that FLUX packs: four latents of the VAE's."""
    config = dict(transformer.config) | {"in_channels": 16, "out_channels": 16, "guidance_embeds": True}
    torch.manual_seed(seed)
    made = type(transformer).from_config({k: v for k, v in config.items() if not k.startswith("_")})
    for parameter in made.parameters():
        if not parameter.any():
            parameter.data.copy_(torch.randn(parameter.shape) * 0.1)
    return made.eval().requires_grad_(False)


def train_router(folder: Path, *, speedup: float = 1.4) -> RouterArtifact:
    """A router for a folder's pipeline, of one trajectory."""
    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return harmonica.train_pipeline(
        pipe,
        ["a red cat", "the moon"],
        TrainingConfig(trajectories=1, batch_size=1, target_speedup=speedup, initial="even", iepo="none"),
        call={"num_inference_steps": STEPS, "guidance_scale": 3.0, "height": HEIGHT, "width": WIDTH},
    )
