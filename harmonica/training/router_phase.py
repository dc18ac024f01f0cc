"""The phase that trains the router by SDT and IEPO."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harmonica.training.config import TrainingConfig
from harmonica.training.context import TrainingContext
from harmonica.training.loss_weights import StepWeights
from harmonica.training.phase import Phase, assumed_speedup
from harmonica.training.research import follows_plan, num_trained_in_pairs


class RouterPhase(Phase):
    """SDT with the IEPO loss (paper Section 4): an update of every row a trajectory."""

    name, state_key = "router", "lambda"

    def __init__(self, context: TrainingContext) -> None:
        super().__init__(context)
        self.weights = StepWeights(context.sampler.num_steps, context.config, context.device)

    @staticmethod
    def costs(config: TrainingConfig, num_steps: int, *, from_start: bool = False) -> list[float]:
        """Count teacher, student, backward and lambda.

        The first three are at every step but the first; lambda is where it is due.
        """
        sdt, last = config.sdt, num_steps - 1
        step = 3.0 + sdt.activation_checkpointing
        trained = last if sdt.objective == "stepwise" else num_trained_in_pairs(num_steps)
        update = (step * trained + (num_steps - trained)) / num_steps
        generation = 1.0
        if follows_plan(sdt.student, sdt.objective):
            generation = 1 / assumed_speedup(config)
            update += generation
        generations = num_steps if from_start else (num_steps + 1) / 2
        refresh = generation * generations if config.iepo != "none" else 0.0
        return [update + refresh * (k % config.iepo_every == 0) for k in range(config.trajectories)]

    def step(self, batch: Any, average: Callable[[Tensor], None]) -> dict[str, float]:
        context, started = self.context, time.monotonic()
        sdt, target = context.sdt, context.target
        batches, metrics = batch.split(self.config.micro_batch_size), dict[str, float]()
        if self.weights.is_due(self.done):
            with sdt.stopwatch.measure("lambda"):
                metrics = self.weights.refresh(context.backend, sdt.router, batches, average)
        records = context.backend.train_trajectory(
            sdt,
            batches,
            self.weights.lambda_T,
            beta=target.beta,
            average=average,
            on_gradient=target.observe,
        )
        means = torch.tensor([[r.loss, r.mse, r.l1] for r in records], device=context.device).mean(0)
        average(means)
        metrics |= dict(zip(("loss", "mse", "l1"), means.tolist(), strict=True)) | {"beta": target.beta}
        metrics["updates_per_s"] = (context.sampler.num_steps - 1) / (time.monotonic() - started)
        target.spare(context.backend.fixed_steps)
        target.update()
        return metrics

    def state(self) -> Tensor:
        return self.weights.lambda_T

    def load_state(self, state: Tensor) -> None:
        self.weights.lambda_T = state.to(self.context.device)
