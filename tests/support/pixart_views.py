"""PixArts by their own branch file and in their pipeline, in float64: the same weights, prompts and noise."""

from dataclasses import dataclass
from typing import Any

import tiny_attached
import torch
from diffusers import PixArtAlphaPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from harmonica.builtin import FASHION_PIXART
from harmonica.data.batch import Batch
from harmonica.models.base import freeze
from harmonica.models.pixart.model import PixArt
from harmonica.models.text_condition import TextCondition
from harmonica.samplers import Sampler, SamplerConfig, make_sampler
from harmonica.samplers.noise import SampleKeys

_CACHEABLE = ("attn", "cross", "mlp")


@dataclass
class PixartViews:
    """A pipeline and the sampler of its transformer's branch file; row r has prompt and noise r of all."""

    pipe: Any
    sampler: Sampler
    noise: Tensor
    condition: TextCondition
    vae_scale: int

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of every call of the pipeline."""
        return {
            "negative_prompt": None,
            "height": self.vae_scale * self.noise.shape[2],
            "width": self.vae_scale * self.noise.shape[3],
            "use_resolution_binning": False,
            "guidance_scale": self.sampler.config.guidance_scale,
            "num_inference_steps": self.sampler.num_steps,
        }

    @property
    def prompts(self) -> list[dict[str, Any]]:
        """Each row's arguments of the pipeline, with its noise, which the views would draw otherwise."""
        condition = self.condition
        columns = {
            "prompt_embeds": condition.embeddings,
            "prompt_attention_mask": condition.mask.long(),
            "negative_prompt_embeds": condition.negative_embeddings,
            "negative_prompt_attention_mask": condition.negative_mask.long(),
            "latents": self.noise,
        }
        rows = range(len(self.noise))
        return [{name: column[row : row + 1] for name, column in columns.items()} for row in rows]

    def batch(self, trajectory: int, size: int) -> Batch:
        """The branch file's rows of a trajectory."""
        rows = [trajectory * size + place for place in range(size)]
        places = [row % len(self.noise) for row in rows]
        return Batch(self.noise[places], self.condition[places], SampleKeys.of(0, rows))


def tiny_views(guidance_scale: float = 1.0, num_steps: int = tiny_attached.STEPS) -> PixartViews:
    """Random weights, with cross-attention and size conditioning; two rows."""
    case = tiny_attached.make_case("alpha 1024", None)
    config = tiny_attached.config(guidance_scale=guidance_scale, num_inference_steps=num_steps)
    return PixartViews(case.pipe, make_sampler(case.model, config), case.noise, case.condition, 2)


def builtin_views(prompts: list[str], guidance_scale: float, num_steps: int) -> PixartViews:
    """The built-in PixArt on Fashion-MNIST, as many rows as prompts."""
    pipe = PixArtAlphaPipeline.from_pretrained(FASHION_PIXART, vae=None, dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    embeds, mask, negative, negative_mask = pipe.encode_prompt(
        prompts, num_images_per_prompt=1, device="cpu", max_sequence_length=16, clean_caption=False
    )
    condition = TextCondition(
        embeddings=embeds.detach().double(),
        mask=mask.bool(),
        negative_embeddings=negative.detach().double(),
        negative_mask=negative_mask.bool(),
    )
    model = PixArt(pipe.transformer, text_tokens=16, cacheable=_CACHEABLE)
    freeze(model)
    config = SamplerConfig(
        name="dpm-solver++", guidance_scale=guidance_scale, num_inference_steps=num_steps, clip_sample=False
    )
    noise = torch.from_numpy(SampleKeys.of(0, range(len(prompts))).start_noise((1, 28, 28))).double()
    return PixartViews(pipe, make_sampler(model, config), noise, condition, pipe.vae_scale_factor)
