"""DDIM over respaced steps, with classifier-free guidance: what one denoising step does to x_t.

Step i is row i of T respaced steps; i = T-1 is the noisiest and runs first.
Shapes: N images, M model rows (2N under guidance: conditional half, then unconditional), C H W image.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from harmonica.diffusion import alphas_cumprod, respaced_timesteps
from harmonica.models.base import BranchedTransformer

MAX_GUIDANCE_SCALE = 50.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """How images are sampled. A router is trained for one of these and refuses another."""

    name: Literal["ddim"] = "ddim"
    """Deterministic DDIM (Song et al. 2021, eta = 0)."""
    num_inference_steps: int = 20
    """T, the respaced denoising steps."""
    guidance_scale: float = 2.0
    """Classifier-free guidance; 1 runs the model once a step, without guidance."""
    guidance_channels: Literal["first_three", "all"] = "all"
    """Which noise channels are guided: the public DiT code guides three, diffusers all."""
    clip_sample: bool = True
    """Clip the predicted x_0 to [-1, 1]: for pixels, not for latents."""

    def __post_init__(self) -> None:
        respaced_timesteps(self.num_inference_steps)
        if not 1.0 <= self.guidance_scale <= MAX_GUIDANCE_SCALE:
            raise ValueError(
                f"sampler.guidance_scale is {self.guidance_scale}: give 1 to {MAX_GUIDANCE_SCALE:g}"
            )

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale != 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def guide(
    output_MCHW: Tensor, scale: float, channels: Literal["first_three", "all"], noise_channels: int
) -> Tensor:
    """Classifier-free guidance on [conditional; unconditional] outputs; both halves get the result.

    Channels that are not guided (the learned variance; under `first_three` the fourth noise channel
    too) pass through, each half keeping its own.
    """
    guided = min(3, noise_channels) if channels == "first_three" else noise_channels
    conditional, unconditional = output_MCHW[:, :guided].chunk(2)
    half = torch.lerp(unconditional, conditional, scale)
    return torch.cat([torch.cat([half, half]), output_MCHW[:, guided:]], dim=1)


@dataclass(frozen=True, slots=True)
class _Step:
    """Coefficients of one step, rounded to float32 as the public code rounds them."""

    signal: float  # sqrt(alpha-bar_t)
    noise: float  # sqrt(1 - alpha-bar_t)
    previous_signal: float
    previous_noise: float


class Ddim:
    """DDIM of one model under one `SamplerConfig`: start, embed, guide, advance, finish."""

    def __init__(self, model: BranchedTransformer, config: SamplerConfig) -> None:
        self.model, self.config = model, config
        self.timesteps = respaced_timesteps(config.num_inference_steps)
        share = alphas_cumprod()[self.timesteps]
        before = np.concatenate([[1.0], share[:-1]])
        columns = (np.sqrt(column) for column in (share, 1 - share, before, 1 - before))
        self._steps = [_Step(*map(float, row)) for row in np.stack(list(columns), axis=1).astype(np.float32)]

    @property
    def num_steps(self) -> int:
        return self.config.num_inference_steps

    def start(self, noise_NCHW: Tensor, condition_N: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (M, C, H, W) and condition (M,) from which step T-1 begins."""
        if not self.config.is_guided:
            return noise_NCHW, condition_N
        null = self.model.null_condition(condition_N)
        return torch.cat([noise_NCHW, noise_NCHW]), torch.cat([condition_N, null])

    def embed(self, i: int, x_MCHW: Tensor, condition_M: Tensor) -> tuple[Tensor, Any]:
        """The model's hidden state and conditioning at step i."""
        if self.config.is_guided:
            # Both halves see the conditional half's latents, as in the public code: under
            # `first_three` the halves' fourth channels drift apart.
            half = x_MCHW.chunk(2)[0]
            x_MCHW = torch.cat([half, half])
        timestep_M = torch.full((x_MCHW.shape[0],), self.timesteps[i], device=x_MCHW.device)
        return self.model.embed(x_MCHW, timestep_M, condition_M)

    def guide(self, output_MCHW: Tensor) -> Tensor:
        """Guided model output, all channels."""
        config = self.config
        if not config.is_guided:
            return output_MCHW
        return guide(output_MCHW, config.guidance_scale, config.guidance_channels, self.model.in_channels)

    def advance(self, i: int, x_MCHW: Tensor, guided_MCHW: Tensor) -> Tensor:
        """x_{t-1} from x_t and the guided output (Song et al. 2021, eq. 12 with sigma = 0)."""
        step = self._steps[i]
        noise = guided_MCHW[:, : self.model.in_channels]
        clean = (x_MCHW - step.noise * noise) / step.signal
        if self.config.clip_sample:
            clean = clean.clamp(-1, 1)
            noise = (x_MCHW - step.signal * clean) / step.noise
        return step.previous_signal * clean + step.previous_noise * noise

    def finish(self, x_MCHW: Tensor) -> Tensor:
        """The images or latents (N, C, H, W)."""
        return x_MCHW.chunk(2)[0] if self.config.is_guided else x_MCHW
