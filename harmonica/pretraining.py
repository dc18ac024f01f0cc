"""Training of the base denoiser itself: only the built-in model needs it, the method does not.

The learning rate warms up, stays, and decays linearly to zero over the last steps, so a run can be
lengthened from any checkpoint before the decay. Weight matrices of the blocks are updated by Muon
(Jordan et al. 2024), all else by AdamW.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from harmonica.diffusion import NUM_TRAIN_TIMESTEPS, add_noise


def learning_rate_factor(step: int, *, warmup: int, total: int, decay: int) -> float:
    """Share of the peak learning rate at `step`: warm-up, plateau, linear decay to zero."""
    return min(1.0, (step + 1) / warmup, max(0.0, (total - step) / decay))


def make_optimizers(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, biases, head."""
    named = list(model.named_parameters())
    is_matrix = {name: p.ndim == 2 and "blocks." in name for name, p in named}
    matrices = [p for name, p in named if is_matrix[name]]
    others = [p for name, p in named if not is_matrix[name]]
    return [
        torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def denoising_loss(
    model: Callable[..., Tensor],
    clean_NCHW: Tensor,
    label_N: Tensor,
    generator: torch.Generator,
    *,
    null_label: int,
    label_dropout: float,
) -> Tensor:
    """Mean squared error of the predicted noise at uniformly drawn timesteps (Ho et al. 2020, eq. 14)."""
    n, device = clean_NCHW.shape[0], clean_NCHW.device
    # Drawn where the generator lives, so that every device trains on the same numbers.
    noise = torch.randn(clean_NCHW.shape, generator=generator).to(device)
    timestep_N = torch.randint(NUM_TRAIN_TIMESTEPS, (n,), generator=generator).to(device)
    dropped_N = (torch.rand(n, generator=generator) < label_dropout).to(device)
    label_N = torch.where(dropped_N, null_label, label_N)
    predicted = model(add_noise(clean_NCHW, noise, timestep_N), timestep_N, label_N)
    return (predicted - noise).square().mean()


class Ema:
    """Exponential moving average of a model's parameters, short-sighted while the run is young."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(model.named_parameters())
        shadow = list(self.shadow.values())
        torch._foreach_lerp_(shadow, [parameters[name] for name in self.shadow], 1 - decay)
