"""Evaluate the built-in flow-matching model through diffusers' own pipeline.

Shapes: N images, C channels, H W image.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.builtin import FASHION_PIXART
from harmonica.data.text_encoder import TextEncoder
from harmonica.torchvision_ops import ensure_torchvision_imports

from .evaluate_text_model import write_evaluation
from .flow_model import ABSENT_PARTS, embed_captions

NUM_STEPS = 20
_BATCH = 100


def load_flow_pipeline(folder: Path) -> Any:
    """Load a folder that `save_flow_pipeline` wrote, in float32.

    Returns:
        A `StableDiffusion3Pipeline` without text encoders and VAE; call it with what `embed_captions` returns
        and `output_type="latent"`, at 8 times the model's height and width, as if there were a VAE.
    """
    ensure_torchvision_imports()
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

    absent = dict.fromkeys(ABSENT_PARTS)
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True, **absent)
    pipe.transformer.float().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class FlowSampler:
    """Samples images by the Euler method, as SD3's pipeline does."""

    def __init__(self, folder: Path) -> None:
        self.pipe = load_flow_pipeline(folder)
        self.encoder = TextEncoder.load(FASHION_PIXART, dtype="float32")

    def sample_images(self, prompts: list[str], guidance_scale: float, seed: int) -> Tensor:
        """Return images (N, C, H, W), about in [-1, 1]."""
        side = self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor
        negative = embed_captions(self.encoder, [""])
        generator = torch.Generator().manual_seed(seed)
        batches = []
        for first in range(0, len(prompts), _BATCH):
            embedded = embed_captions(self.encoder, prompts[first : first + _BATCH])
            n = len(embedded["prompt_embeds"])
            batches.append(
                self.pipe(
                    **embedded,
                    negative_prompt_embeds=negative["prompt_embeds"].expand(n, -1, -1),
                    negative_pooled_prompt_embeds=negative["pooled_prompt_embeds"].expand(n, -1),
                    num_inference_steps=NUM_STEPS,
                    guidance_scale=guidance_scale,
                    height=side,
                    width=side,
                    generator=generator,
                    output_type="latent",
                ).images
            )
        return torch.cat(batches)


def evaluate_flow_model(folder: Path, count: int, *, seed: int = 0) -> dict[str, Any]:
    """Evaluate a folder's model and write `report.json` and `samples.png` there."""
    return write_evaluation(FlowSampler(folder), folder, count, seed=seed)
