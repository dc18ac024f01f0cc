"""Training of a base denoiser, which only the built-in models need.

The learning rate warms up, stays, and decays linearly to zero over the last steps, so a run can be
lengthened from any checkpoint before the decay. Weight matrices of the blocks are updated by Muon
(Jordan et al. 2024), all else by AdamW.
Shapes: N batch, C channels, H W image.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from harmonica.samplers.noise_schedule import NUM_TRAIN_TIMESTEPS, add_noise, alphas_cumprod

_MAX_WEIGHT = 20.0


def learning_rate_factor(step: int, *, warmup: int, total: int, decay: int) -> float:
    """Return the fraction of the peak learning rate at `step`: warm-up, plateau, linear decay."""
    return min(1.0, (step + 1) / warmup, max(0.0, (total - step) / decay))


@dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """How long and how fast to learn."""

    steps: int
    """Optimiser steps in all."""
    decay_steps: int
    """Number of last steps, over which the learning rate falls to zero."""
    warmup_steps: int
    """Number of first steps, over which the learning rate rises."""
    learning_rate: float
    """Peak learning rate."""
    weight_decay: float
    """Weight decay of the blocks' matrices."""
    ema_decay: float
    """Decay of the averaged weights, which are the ones kept."""


def make_optimizers(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices, and AdamW for embeddings, biases and head."""
    named = list(model.named_parameters())
    is_matrix = {name: p.ndim == 2 and "blocks." in name and "table" not in name for name, p in named}
    matrices = [p for name, p in named if is_matrix[name]]
    others = [p for name, p in named if not is_matrix[name]]
    return [
        torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def drop(n: int, share: float, generator: torch.Generator) -> Tensor:
    """Draw which of n rows (N,) bool train without their condition, for classifier-free guidance."""
    return torch.rand(n, generator=generator) < share


@dataclass(frozen=True, slots=True)
class NoisyBatch:
    """Clean images with noise added at uniformly drawn timesteps (Ho et al. 2020, algorithm 1)."""

    images: Tensor
    """x_t (N, C, H, W)."""
    timesteps: Tensor
    """(N,) int64."""
    noise: Tensor
    """(N, C, H, W): what the model is to predict."""

    @classmethod
    def draw(cls, clean_NCHW: Tensor, generator: torch.Generator) -> Self:
        n, device = clean_NCHW.shape[0], clean_NCHW.device
        # Drawn where the generator lives, so that every device trains on the same numbers.
        noise = torch.randn(clean_NCHW.shape, generator=generator).to(device)
        timestep_N = torch.randint(NUM_TRAIN_TIMESTEPS, (n,), generator=generator).to(device)
        return cls(add_noise(clean_NCHW, noise, timestep_N), timestep_N, noise)


def distillation_loss(predicted_NCHW: Tensor, teacher_NCHW: Tensor, timestep_N: Tensor) -> Tensor:
    """Return the mean squared distance from a teacher's noise, limited as an error of x_0.

    What an image is of is settled at high noise, where predictions of the noise hardly differ: there
    the error counts up to `_MAX_WEIGHT` times.
    """
    signal_N = torch.as_tensor(alphas_cumprod(), device=timestep_N.device)[timestep_N]
    weight_N = ((1 - signal_N) / signal_N).clamp(max=_MAX_WEIGHT).to(predicted_NCHW.dtype)
    return (weight_N[:, None, None, None] * (predicted_NCHW - teacher_NCHW).square()).mean()


class Ema:
    """Exponential moving average of a model's parameters, with a shorter window in early steps."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(model.named_parameters())
        shadow = list(self.shadow.values())
        torch._foreach_lerp_(shadow, [parameters[name] for name in self.shadow], 1 - decay)


class Learner:
    """A model in training, with the state that a resumed run needs."""

    def __init__(self, model: nn.Module, config: LearningConfig) -> None:
        self.model, self.config = model, config
        self.ema = Ema(model, config.ema_decay)
        self.optimizers = make_optimizers(model, config.learning_rate, config.weight_decay)
        self.step = 0

    @property
    def factor(self) -> float:
        """Return the fraction of the peak learning rate for the next step."""
        c = self.config
        return learning_rate_factor(self.step, warmup=c.warmup_steps, total=c.steps, decay=c.decay_steps)

    def learn(self, loss: Tensor) -> None:
        """Take one optimiser step on `loss`."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        learning_rate = self.config.learning_rate * self.factor
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model, self.step)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.shadow,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.shadow = state["ema"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
