"""Lambda, the weight of a step's error in SDT's loss: all ones, or measured anew every so often by IEPO."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harmonica.core.router import Router
from harmonica.samplers import Sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.config import TrainingConfig
from harmonica.training.iepo import image_error_proxy

_SMALLEST = 1e-30


class StepWeights:
    """Of rows 0 ... T-2 (paper Section 4.3)."""

    def __init__(self, num_steps: int, config: TrainingConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.lambda_T = torch.ones(num_steps - 1, device=device)

    def is_due(self, trajectory: int) -> bool:
        """Before this trajectory of the router's, counted from 0."""
        return self.config.iepo != "none" and trajectory % self.config.iepo_every == 0

    def refresh(
        self,
        sampler: Sampler,
        router: Router,
        noise_NCHW: Tensor,
        condition_N: Any,
        keys: SampleKeys,
        average: Callable[[Tensor], None],
    ) -> dict[str, float]:
        """Measure it under the router as it stands; the metrics to log."""
        config = self.config
        assert config.iepo != "none"
        self.lambda_T = image_error_proxy(
            sampler,
            router,
            noise_NCHW,
            condition_N,
            kind=config.iepo,
            threshold=config.sdt.threshold,
            reuse=config.sdt.reuse,
            student=config.sdt.student,
            keys=keys,
            micro_batch_size=config.micro_batch_size,
            average=average,
        )
        measured = {f"lambda.step_{i:03d}": value for i, value in enumerate(self.lambda_T.tolist())}
        if config.has_target:
            # Beta follows, so only ratios count; lambda as measured may lie below what AdamW rounds off.
            self.lambda_T = self.lambda_T / self.lambda_T.mean().clamp_min(_SMALLEST)
        return measured
