"""DDIM and IDDPM on the respaced chain of the public DiT code.

Step i goes to the timestep of step i - 1.

diffusers' schedulers step to t - 1000 // T instead, which is no timestep of the chain unless T divides it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harmonica.models.base import BranchedTransformer
from harmonica.samplers.base import Sampler, State
from harmonica.samplers.config import SamplerConfig
from harmonica.samplers.noise_schedule import alphas_cumprod, respaced_timesteps


@dataclass(frozen=True, slots=True)
class _Step:
    """Coefficients of one step, rounded to float32 as the public code rounds them."""

    signal: float  # sqrt(alpha-bar_t)
    noise: float  # sqrt(1 - alpha-bar_t)
    previous_signal: float
    previous_noise: float


def _rounded(*columns: np.ndarray) -> list[tuple[float, ...]]:
    """Return the values of each step, rounded to float32."""
    return [tuple(map(float, row)) for row in np.stack(columns, axis=1).astype(np.float32)]


class _Respaced(Sampler):
    """The respaced chain and the predicted x_0, which both samplers share."""

    def __init__(self, model: BranchedTransformer, config: SamplerConfig) -> None:
        timesteps = respaced_timesteps(config.num_inference_steps)
        super().__init__(model, config, timesteps)
        self._share = alphas_cumprod()[timesteps]
        self._share_before = np.concatenate([[1.0], self._share[:-1]])

    def _clean(self, x_MCHW: Tensor, noise_MCHW: Tensor, signal: float, noise: float) -> Tensor:
        clean = (x_MCHW - noise * noise_MCHW) / signal
        return clean.clamp(-1, 1) if self.config.clip_sample else clean

    def _clean_at(self, i: int, x_NCHW: Tensor, predicted_NCHW: Tensor) -> Tensor:
        share = float(self._share[i])
        return self._clean(x_NCHW, predicted_NCHW, share**0.5, (1 - share) ** 0.5)


class Ddim(_Respaced):
    """Deterministic DDIM (Song et al. 2021, eq. 12 with sigma = 0)."""

    def __init__(self, model: BranchedTransformer, config: SamplerConfig) -> None:
        super().__init__(model, config)
        now, before = self._share, self._share_before
        columns = (np.sqrt(column) for column in (now, 1 - now, before, 1 - before))
        self._steps = [_Step(*row) for row in _rounded(*columns)]

    def advance(self, i: int, state: State, guided_MCHW: Tensor) -> State:
        step, x = self._steps[i], state.x_MCHW
        noise = guided_MCHW[:, : self.model.in_channels]
        clean = self._clean(x, noise, step.signal, step.noise)
        if self.config.clip_sample:
            noise = (x - step.signal * clean) / step.noise
        return self._moved(state, step.previous_signal * clean + step.previous_noise * noise)


@dataclass(frozen=True, slots=True)
class _Posterior:
    """q(x_{t-1} | x_t, x_0) of one step: mean = clean * x_0 + current * x_t."""

    signal: float
    noise: float
    clean: float
    current: float
    log_largest: float  # log beta_t
    log_smallest: float  # log of the posterior variance


class Iddpm(_Respaced):
    """Ancestral sampling with the learned variance range.

    Source: Nichol and Dhariwal 2021, eq. 15.

    A model that predicts no variance is sampled with the posterior's, the lower end of that range: at
    few steps the upper end leaves visible noise.
    """

    is_stochastic = True

    def __init__(self, model: BranchedTransformer, config: SamplerConfig) -> None:
        super().__init__(model, config)
        now, before = self._share, self._share_before
        beta = 1 - now / before
        variance = beta * (1 - before) / (1 - now)
        variance[0] = variance[1]  # zero at the last step, which draws nothing: its logarithm is not used
        columns = (
            np.sqrt(now),
            np.sqrt(1 - now),
            beta * np.sqrt(before) / (1 - now),
            (1 - before) * np.sqrt(now / before) / (1 - now),
            np.log(beta),
            np.log(variance),
        )
        self._steps = [_Posterior(*row) for row in _rounded(*columns)]

    def advance(self, i: int, state: State, guided_MCHW: Tensor) -> State:
        step, x, channels = self._steps[i], state.x_MCHW, self.model.in_channels
        clean = self._clean(x, guided_MCHW[:, :channels], step.signal, step.noise)
        mean = step.clean * clean + step.current * x
        if i == 0:
            return self._moved(state, mean)
        if self.model.out_channels == 2 * channels:
            share = (guided_MCHW[:, channels:] + 1) / 2
            deviation = (0.5 * (share * step.log_largest + (1 - share) * step.log_smallest)).exp()
        else:
            deviation = torch.full_like(mean[:, :1], step.log_smallest / 2).exp()
        return self._moved(state, mean + deviation * self._draw(i, state))
