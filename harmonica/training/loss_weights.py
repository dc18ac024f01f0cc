"""Lambda, the weight of a step's error in the loss: all ones, or measured every C trajectories by IEPO."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from harmonica.core.router import Router
from harmonica.training.backend import TrajectoryBackend
from harmonica.training.config import TrainingConfig
from harmonica.training.iepo import lambda_of

_SMALLEST = 1e-30


class StepWeights:
    """Lambda of steps 0 ... T-2 (paper Section 4.3), and when it is due."""

    def __init__(self, num_steps: int, config: TrainingConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.lambda_T = torch.ones(num_steps - 1, device=device)

    def is_due(self, trajectory: int) -> bool:
        """Return whether to refresh before this trajectory of the router phase, counted from 0."""
        return self.config.iepo != "none" and trajectory % self.config.iepo_every == 0

    def refresh(
        self,
        backend: TrajectoryBackend,
        router: Router,
        batches: Sequence[Any],
        average: Callable[[Tensor], None],
    ) -> dict[str, float]:
        """Measure lambda under the router as it stands and return the metrics to log."""
        config = self.config
        assert config.iepo != "none"
        changes = ((len(batch), backend.image_changes(router, batch, config)) for batch in batches)
        self.lambda_T = lambda_of(changes, config.iepo, average)
        measured = {f"lambda.step_{i:03d}": value for i, value in enumerate(self.lambda_T.tolist())}
        if config.has_target:
            # Beta follows, so only ratios count; lambda as measured may lie below what AdamW rounds off.
            self.lambda_T = self.lambda_T / self.lambda_T.mean().clamp_min(_SMALLEST)
        return measured
