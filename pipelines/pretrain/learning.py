"""Training of a base denoiser, which only the built-in models need.

The learning rate warms up, stays, and decays linearly to zero over the last steps, so a run can be
lengthened from any checkpoint before the decay. Weight matrices of the blocks are updated by Muon
(Jordan et al. 2024), all else by AdamW.
Shapes: N batch, C channels, H W image.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Self

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import PARAM_LIST, AveragedModel, get_ema_multi_avg_fn

from harmonica.samplers.noise_schedule import NUM_TRAIN_TIMESTEPS, add_noise, alphas_cumprod
from harmonica.validation.settings import Count, Field, Positive, settings

_MAX_WEIGHT = 20.0


def learning_rate_factor(step: int, *, warmup: int, total: int, decay: int) -> float:
    """Return the fraction of the peak learning rate at `step`.

    It rises in the warm-up, stays at 1, and falls linearly to 0.
    """
    return min(1.0, (step + 1) / warmup, max(0.0, (total - step) / decay))


@settings()
class LearningConfig:
    """Settings of the optimisers and of the learning rate's course."""

    steps: Count
    """Optimiser steps in all."""
    decay_steps: Count
    """Number of last steps, over which the learning rate falls to zero."""
    warmup_steps: Count
    """Number of first steps, over which the learning rate rises."""
    learning_rate: Positive
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)]
    """Weight decay of the blocks' matrices."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    """Decay of the averaged weights, which are the ones kept."""


def make_optimizers(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices, and AdamW for the other parameters.

    The others are embeddings, biases and the head.
    """
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
    """Draw the rows (N,) bool that train without their condition.

    Classifier-free guidance needs them.
    """
    return torch.rand(n, generator=generator) < share


@dataclass(frozen=True, slots=True)
class NoisyBatch:
    """Images with noise added at random timesteps.

    Timesteps are drawn uniformly (Ho et al. 2020, algorithm 1).
    """

    images: Tensor
    """x_t (N, C, H, W)."""
    timesteps: Tensor
    """(N,) int64."""
    noise: Tensor
    """(N, C, H, W); the model learns to predict it."""

    @classmethod
    def draw(cls, clean_NCHW: Tensor, generator: torch.Generator) -> Self:
        """Add noise to clean images (N, C, H, W) at timesteps drawn for each."""
        n, device = clean_NCHW.shape[0], clean_NCHW.device
        # Drawn where the generator lives, so that every device trains on the same numbers.
        noise = torch.randn(clean_NCHW.shape, generator=generator).to(device)
        timestep_N = torch.randint(NUM_TRAIN_TIMESTEPS, (n,), generator=generator).to(device)
        return cls(add_noise(clean_NCHW, noise, timestep_N), timestep_N, noise)


def distillation_loss(predicted_NCHW: Tensor, teacher_NCHW: Tensor, timestep_N: Tensor) -> Tensor:
    """Return the mean squared distance from a teacher's predicted noise.

    The distance is weighted as an error of x_0, by at most `_MAX_WEIGHT`: the content of an image is
    settled at high noise, where predictions of the noise hardly differ.
    """
    signal_N = torch.as_tensor(alphas_cumprod(), device=timestep_N.device)[timestep_N]
    weight_N = ((1 - signal_N) / signal_N).clamp(max=_MAX_WEIGHT).to(predicted_NCHW.dtype)
    return (weight_N[:, None, None, None] * (predicted_NCHW - teacher_NCHW).square()).mean()


class Learner:
    """A model in training, with the state that a resumed run needs."""

    def __init__(self, model: nn.Module, config: LearningConfig) -> None:
        self.model, self.config = model, config
        self.ema = AveragedModel(model, multi_avg_fn=self._average)
        self.ema.n_averaged += 1  # the initial weights, which the first update would otherwise replace
        self.optimizers = make_optimizers(model, config.learning_rate, config.weight_decay)
        self.step = 0

    def _average(self, averaged: PARAM_LIST, current: PARAM_LIST, num_averaged: Tensor | int) -> None:
        """Average with a decay that is smaller while the run is young."""
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        get_ema_multi_avg_fn(decay)(averaged, current, num_averaged)

    def averaged_parameters(self) -> dict[str, Tensor]:
        """Return the parameters' moving averages by name, without gradients."""
        return {name: p.detach() for name, p in self.ema.module.named_parameters()}

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
        self.ema.update_parameters(self.model)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the model, its averages and the optimisers."""
        return {
            "model": self.model.state_dict(),
            "ema": self.averaged_parameters(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        for name, averaged in self.averaged_parameters().items():
            averaged.copy_(state["ema"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
