"""HarmoniCa's step-wise denoising training (SDT) of a router, with IEPO loss.

Source: arXiv 2410.01723.

Along one trajectory, at each step i = T-2 ... 0, the uncached teacher and the cached student see the
same x_t; one optimiser update a step; x_{t-1} comes from the student, detached. The base model is
frozen and the teacher runs without grad: a step costs two forwards and one activation backward, and
only B numbers cross the network.

Memory is bounded in two ways that leave the update as it is, `activation_checkpointing` and
micro-batches; `harmonica.training.memory_estimates` says what each comes to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harmonica.core.cache import BranchCache
from harmonica.core.passes import soft_pass
from harmonica.core.router import Router
from harmonica.core.trajectory import planned_step
from harmonica.data.batch import Batch
from harmonica.execution.levels import runner_of
from harmonica.samplers import Sampler, State
from harmonica.training.research import follows_plan, trains_in_pairs
from harmonica.training.sdt_config import SdtConfig
from harmonica.training.timers import Stopwatch


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One update of row i."""

    step: int
    mse: float
    """Student against teacher, mean over all guided output channels."""
    l1: float
    """Sum of the row's scores."""
    loss: float
    """lambda_i * mse + beta * l1; the scores times their costs where the penalty counts those."""


@dataclass(slots=True)
class _MicroBatch:
    """Samples on their way along the trajectory."""

    state: State
    cache: BranchCache


Update = tuple[int, Tensor]
"""A step and the numbers of its record (3,), on the device still."""


def records_of(updates: Sequence[Update]) -> list[StepRecord]:
    """Read the numbers of all updates back at once.

    Each reading waits for the device.
    """
    numbers = torch.stack([values for _, values in updates]).tolist() if updates else []
    return [StepRecord(i, *values) for (i, _), values in zip(updates, numbers, strict=True)]


class SdtTrainer:
    """A router, its optimiser and the loop over one trajectory."""

    def __init__(self, sampler: Sampler, router: Router, config: SdtConfig) -> None:
        self.sampler, self.router, self.config = sampler, router, config
        self.stopwatch = Stopwatch(router.rows[0].device)
        trained = [row for row in router.rows if row.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=config.learning_rate, eps=config.epsilon, weight_decay=0.0
        )
        self.costs_B = torch.ones_like(router.rows[0])
        if config.penalty == "macs":
            macs = self.costs_B.new_tensor(sampler.model.macs().branches)
            self.costs_B = macs / macs.mean()

    def train_trajectory(
        self,
        batches: Sequence[Batch],
        lambda_T: Tensor,
        *,
        beta: float | None = None,
        average: Callable[[Tensor], None] | None = None,
        on_gradient: Callable[[int, Tensor], object] | None = None,
    ) -> tuple[list[StepRecord], Tensor]:
        """Update every trained row once, noisiest step first.

        Args:
            batches: what is computed at a time (`Batch.split`); each update is that of all samples.
            lambda_T: lambda_i of steps 0 ... T-2, (T-1,).
            beta: replaces the configured one, for a beta that follows a target.
            average: averages a tensor over all workers in place; none on one worker.
            on_gradient: sees (i, gradient of row i (B,)) before the update.

        Returns:
            The records in the order run, and the student's final images or latents (N, C, H, W).
        """
        sampler = self.sampler
        beta = self.config.beta if beta is None else beta
        parts = [self._start(batch) for batch in batches]
        updated: list[Update] = []
        refresh_rows: list[list[bool]] = []
        for i in reversed(range(sampler.num_steps - 1)):
            if not self.trains(i):
                for part in parts:
                    self._full_step(i, part)
                continue
            refresh_rows = refresh_rows or self.refresh_rows(i)
            scores_B = self.router.scores(i)
            measured = [self._step(i, part, scores_B, refresh_rows[i]) for part in parts]
            update = self.update(
                i, scores_B, measured, lambda_T[i], beta=beta, average=average, on_gradient=on_gradient
            )
            updated.append(update)
        records = records_of(updated)
        return records, torch.cat([sampler.finish(part.state) for part in parts])

    def refresh_rows(self, first: int) -> list[list[bool]]:
        """Return where r > tau in every row (T x B), read back once a trajectory.

        Reading a row back would wait for the device at each update. All can be read at once: an update moves
        its own row, which the trajectory has then passed, and clamps those that are still to come.

        Args:
            first: row of the trajectory's first update.
        """
        config = self.config
        return self.router.rows_above(config.threshold, limit=config.clamp, limited=first)

    def update(
        self,
        i: int,
        scores_B: Tensor,
        measured: Sequence[tuple[Tensor, Tensor, int]],
        weight: Tensor,
        *,
        beta: float,
        average: Callable[[Tensor], None] | None = None,
        on_gradient: Callable[[int, Tensor], object] | None = None,
    ) -> Update:
        """Update row i of the router.

        Args:
            scores_B: the row's scores, with their graph.
            measured: of each part of the batch, the sum of squared errors, its gradient in the scores (B,),
                and the number of elements.
            weight: lambda_i.
        """
        row = self.router.rows[i]
        error, error_B, count = (sum(values) for values in zip(*measured, strict=True))
        mse, l1 = error / count, scores_B.sum()
        scores_B.backward(weight / count * error_B + beta * self.costs_B)
        assert row.grad is not None
        if average is not None:
            with self.stopwatch.measure("reduce"):
                average(row.grad)
        if on_gradient is not None:
            on_gradient(i, row.grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.router.clamp_(self.config.clamp)
        loss = weight * mse + beta * (self.costs_B * scores_B).sum()
        return i, torch.stack([mse.double(), l1.double(), loss.double()]).detach()

    def trains(self, i: int) -> bool:
        """Return whether row i is learned.

        In pairs, the first step of each computes everything.
        """
        last = self.sampler.num_steps - 1
        return i < last and (self.config.objective == "stepwise" or trains_in_pairs(i, last + 1))

    @torch.no_grad()
    def _full_step(self, i: int, part: "_MicroBatch") -> None:
        everything = (True,) * self.router.num_branches
        part.state, _ = planned_step(self.sampler, i, part.state, everything, part.cache)

    @torch.no_grad()
    def _start(self, batch: Batch) -> _MicroBatch:
        """Run step T-1: it computes everything, fills the cache and trains nothing."""
        cache = BranchCache(self.router.num_branches, self.config.reuse)
        part = _MicroBatch(batch.start(self.sampler), cache)
        self._full_step(self.sampler.num_steps - 1, part)
        return part

    def _step(
        self, i: int, part: _MicroBatch, scores_B: Tensor, row: Sequence[bool]
    ) -> tuple[Tensor, Tensor, int]:
        """Take the samples past step i.

        Args:
            row: where r > tau.

        Returns:
            The sum of squared errors, its gradient in the scores (B,), and the number of elements.
        """
        sampler, model, config = self.sampler, self.sampler.model, self.config
        is_hard = follows_plan(config.student, config.objective)
        with torch.no_grad(), self.stopwatch.measure("teacher"):
            hidden, conditioning = sampler.embed(i, part.state)
            target = sampler.guide(runner_of(model).full_pass(model, hidden, conditioning))
        with self.stopwatch.measure("student"):
            output = soft_pass(
                model,
                hidden,
                conditioning,
                scores_B,
                [False] * len(row) if is_hard else row,
                part.cache,
                i,
                recompute=config.activation_checkpointing,
            )
            guided = sampler.guide(output)
        # The gradient of the sum of squares: a mean times lambda, some 1e-10 an element, would underflow
        # on its way through a float16 model. And sums add up over micro-batches.
        error = (guided - target).square().sum()
        with self.stopwatch.measure("backward"):
            (error_B,) = torch.autograd.grad(error, scores_B)
        if is_hard:
            with torch.no_grad(), self.stopwatch.measure("student"):
                part.state, _ = planned_step(sampler, i, part.state, row, part.cache)
        else:
            along = target if config.objective == "pairwise" else guided.detach()
            part.state = sampler.advance(i, part.state, along)
        return error.detach(), error_B, guided.numel()
