"""The forward process of 1000 linear betas, and the timesteps of samplers."""

from functools import cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


@cache
def alphas_cumprod() -> np.ndarray:
    """Return alpha-bar (1000,), float64, of the linear schedule beta = 1e-4 ... 0.02."""
    return np.cumprod(1.0 - np.linspace(1e-4, 0.02, NUM_TRAIN_TIMESTEPS, dtype=np.float64))


def respaced_timesteps(num_steps: int) -> list[int]:
    """Return the timesteps of the respaced steps, ascending.

    Entry i is row i of a router.

    They are evenly spaced from 0 to 999, both included; the spacing is added up and then rounded, as in the
    public DiT code: multiplying instead puts some step elsewhere for a quarter of all T, 21 the first.

    Raises:
        ValueError: `num_steps` is not between 2 and 1000.
    """
    if not 2 <= num_steps <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"num_inference_steps is {num_steps}: give 2 to {NUM_TRAIN_TIMESTEPS}")
    stride = (NUM_TRAIN_TIMESTEPS - 1) / (num_steps - 1)
    return [round(at) for at in accumulate([0.0] + [stride] * (num_steps - 1))]


def add_noise(clean_NCHW: Tensor, noise_NCHW: Tensor, timestep_N: Tensor) -> Tensor:
    """Return x_t = sqrt(alpha-bar) x_0 + sqrt(1 - alpha-bar) epsilon."""
    signal = torch.as_tensor(alphas_cumprod(), dtype=torch.float32, device=clean_NCHW.device)
    share = signal[timestep_N][:, None, None, None]
    return share.sqrt() * clean_NCHW + (1 - share).sqrt() * noise_NCHW
