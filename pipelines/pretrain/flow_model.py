"""The flow-matching model: a small SD3 transformer on pixels.

It starts from the built-in DiT. Its captions are embedded by the built-in PixArt's text encoder;
`pipelines.pretrain.flow_matching` trains it. It lies beside this module, since only what is trained and
measured in a clone uses it. Rectified flow (Esser et al. 2024, arXiv 2403.03206): x_s = (1 - s) x_0 + s
epsilon, and the model predicts the velocity epsilon - x_0. Shapes: N batch, C channels, H W image, S text
tokens, D width.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from harmonica.data.text_encoder import TextEncoder
from harmonica.models.dit.model import DiT
from harmonica.samplers.noise_schedule import NUM_TRAIN_TIMESTEPS, alphas_cumprod
from harmonica.torchvision_ops import ensure_torchvision_imports

from .text_model import TEXT_TOKENS, TEXT_WIDTH, load_dit

ensure_torchvision_imports()

from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel  # noqa: E402

ABSENT_PARTS = (
    *("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
    *("feature_extractor", "image_encoder"),
)
"""Parts of a `StableDiffusion3Pipeline` that the folder has none of; diffusers wants each given as None."""
_SMALLEST_SIGMA = 0.01  # of the teacher's own schedule at its first timestep


def embed_captions(encoder: TextEncoder, captions: Sequence[str]) -> dict[str, Tensor]:
    """Embed captions as the arguments that stand for a prompt.

    The arguments are those of `StableDiffusion3Pipeline`.

    Returns:
        `prompt_embeds` (N, S, TEXT_WIDTH), zero after the caption's end, and `pooled_prompt_embeds`
        (N, TEXT_WIDTH), their mean up to there.
    """
    embeddings_NSC, mask_NS = encoder.encode(list(captions), TEXT_TOKENS)
    mask_NS1 = mask_NS[..., None].to(embeddings_NSC.dtype)
    embeddings_NSC = embeddings_NSC * mask_NS1
    pooled_NC = embeddings_NSC.sum(dim=1) / mask_NS1.sum(dim=1).clamp_min(1)
    return {"prompt_embeds": embeddings_NSC, "pooled_prompt_embeds": pooled_NC}


class FlowModel(nn.Module):
    """An SD3 transformer that takes tensors and returns one."""

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, images_NCHW: Tensor, text_NSC: Tensor, pooled_NC: Tensor, timestep_N: Tensor) -> Tensor:
        """Return the predicted velocity (N, C, H, W)."""
        velocity_NCHW: Tensor
        (velocity_NCHW,) = self.transformer(images_NCHW, text_NSC, pooled_NC, timestep_N, return_dict=False)
        return velocity_NCHW


def make_flow_model(start: str, seed: int) -> FlowModel:
    """Make an SD3 transformer whose image stream is the DiT `start`.

    The text stream is new.

    Raises:
        ValueError: `start` is no DiT.
    """
    dit = load_dit(start)
    shape = dit.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=shape.sample_size,
            patch_size=shape.patch_size,
            in_channels=shape.in_channels,
            out_channels=shape.out_channels,
            num_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            attention_head_dim=shape.attention_head_dim,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=shape.hidden_size,
            pooled_projection_dim=TEXT_WIDTH,
            pos_embed_max_size=shape.sample_size // shape.patch_size,
        )
    _copy_image_stream(transformer, dit)
    return FlowModel(transformer)


@torch.no_grad()
def _copy_image_stream(transformer: Any, dit: DiT) -> None:
    """Copy what both models have.

    SD3's last modulation has scale before shift, and the DiT's after it.
    """
    pairs: list[tuple[Any, Any]] = [
        (transformer.pos_embed.proj, dit.x_embedder.proj),
        (transformer.time_text_embed.timestep_embedder.linear_1, dit.t_embedder.mlp[0]),
        (transformer.time_text_embed.timestep_embedder.linear_2, dit.t_embedder.mlp[2]),
        (transformer.proj_out, dit.final_layer.linear),
    ]
    blocks: Any = dit.blocks
    for ours, theirs in zip(transformer.transformer_blocks, blocks, strict=True):
        pairs += [
            (ours.norm1.linear, theirs.adaLN_modulation[1]),
            (ours.attn.to_out[0], theirs.attn.proj),
            (ours.ff.net[0].proj, theirs.mlp.fc1),
            (ours.ff.net[2], theirs.mlp.fc2),
        ]
        for name in ("weight", "bias"):
            parts = getattr(theirs.attn.qkv, name).chunk(3)
            for layer, part in zip((ours.attn.to_q, ours.attn.to_k, ours.attn.to_v), parts, strict=True):
                getattr(layer, name).copy_(part)
    for ours, theirs in pairs:
        ours.weight.copy_(theirs.weight)
        ours.bias.copy_(theirs.bias)
    final: Any = dit.final_layer.adaLN_modulation[1]
    for name in ("weight", "bias"):
        getattr(transformer.norm_out.linear, name).copy_(getattr(final, name).roll(len(final.bias) // 2, 0))
    pooled = transformer.time_text_embed.text_embedder.linear_2
    pooled.weight.zero_()
    pooled.bias.copy_(dit.y_embedder.embedding_table.weight.mean(dim=0))


@dataclass(frozen=True, slots=True)
class FlowBatch:
    """Images on the way between data and noise (arXiv 2403.03206, section 2)."""

    images: Tensor
    """x_s (N, C, H, W)."""
    sigmas: Tensor
    """s (N,), float32, in (0, 1]."""
    velocity: Tensor
    """epsilon - x_0 (N, C, H, W): what the model is to predict."""

    @classmethod
    def draw(cls, clean_NCHW: Tensor, generator: torch.Generator) -> Self:
        """Draw noise and uniform sigmas for clean images (N, C, H, W)."""
        noise = torch.randn(clean_NCHW.shape, generator=generator).to(clean_NCHW.device)
        sigma_N = 1 - torch.rand(len(clean_NCHW), generator=generator) * (1 - _SMALLEST_SIGMA)
        sigma_N = sigma_N.to(clean_NCHW.device)
        share = sigma_N[:, None, None, None]
        return cls((1 - share) * clean_NCHW + share * noise, sigma_N, noise - clean_NCHW)

    @property
    def timesteps(self) -> Tensor:
        """Return what SD3 calls the timestep (N,): 1000 s."""
        return self.sigmas * NUM_TRAIN_TIMESTEPS


@torch.no_grad()
def teacher_velocity(dit: DiT, batch: FlowBatch, label_N: Tensor, rows: Sequence[int]) -> Tensor:
    """Return the velocity (len(rows), C, H, W) that a DiT implies.

    The DiT predicts noise.

    A DDPM image sqrt(a) x_0 + sqrt(1 - a) epsilon is x_s times sqrt(a) + sqrt(1 - a), at the timestep where
    s = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)).
    """
    signal = torch.as_tensor(alphas_cumprod(), device=batch.sigmas.device).float()
    length = signal.sqrt() + (1 - signal).sqrt()
    images, sigma_N = batch.images[rows], batch.sigmas[rows]
    timestep_N = torch.searchsorted((1 - signal).sqrt() / length, sigma_N).clamp(max=NUM_TRAIN_TIMESTEPS - 1)
    scale, share = (each[timestep_N][:, None, None, None] for each in (length, signal))
    noisy = images * scale
    noise = dit(noisy, timestep_N, label_N)
    clean = (noisy - (1 - share).sqrt() * noise) / share.sqrt()
    velocity_NCHW: Tensor = noise - clean.clamp(-1, 1)
    return velocity_NCHW


def save_flow_pipeline(model: FlowModel, folder: Path) -> None:
    """Save the folder of a `StableDiffusion3Pipeline`, in half precision.

    It has no text encoders and no VAE.

    It takes what `embed_captions` returns, and with `output_type="latent"` its latents are the image.
    """
    model.transformer.half().save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
    }
    index |= {name: [None, None] for name in ABSENT_PARTS}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
