"""Policies of a transformer's calls while a router is trained in a pipeline.

A policy trains by SDT, or generates images.

A trajectory is one call of the pipeline. SDT (arXiv 2410.01723) needs of each step the teacher's output and
the student's on the same input; the pipeline's scheduler goes on from the student's. Where guidance takes two
calls, the step's update is made of both.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from harmonica.core.cache import Reuse
from harmonica.core.router import FIXED_LOGIT, Router
from harmonica.integrations.recorded.tensor_tags import tensors_of
from harmonica.integrations.recorded.trajectory import CallTrajectory
from harmonica.integrations.recorded.transformer_step import TransformerStep
from harmonica.integrations.recorded.unit_store import UnitStore
from harmonica.integrations.recorded.view import RecordedTransformer
from harmonica.training.sdt import SdtTrainer, StepRecord, Update, records_of


class Policy(ABC):
    """A policy decides what each call of a trajectory returns."""

    def new_kept(self, view: RecordedTransformer, reuse: Reuse) -> UnitStore:
        """Return the empty values of one of a step's calls."""
        return view.new_kept(reuse)

    @abstractmethod
    def compute(self, step: TransformerStep) -> Any:
        """Return what the call gives the pipeline."""

    def finish_step(self, i: int) -> None:  # noqa: B027  # most policies need nothing
        """See the end of step i, when all its calls have been made."""


class PolicyTrajectory(CallTrajectory):
    """A trajectory whose calls follow a policy."""

    policy: Policy
    num_calls = 0
    """Calls of the last whole trajectory whose values were kept side by side; 0 before there was one."""

    def begin(self, policy: Policy) -> None:
        """Follow a policy in the next call of the pipeline."""
        self.reset()
        self.policy = policy
        self._last: int | None = None

    def finish(self) -> None:
        """End the trajectory of a call of the pipeline that has returned."""
        if self._last is not None:
            self.policy.finish_step(self._last)
        self.num_calls = len(self._kept)
        self.reset()

    def new_kept(self, view: RecordedTransformer) -> UnitStore:
        return self.policy.new_kept(view, self.reuse)

    def compute(self, step: TransformerStep) -> Any:
        if self._last is not None and self._last != step.i:
            self.policy.finish_step(self._last)
        self._last = step.i
        return self.policy.compute(step)


@dataclass
class Generation(Policy):
    """A generation under the router's soft weights, or its plan.

    Steps in `full` compute everything. Under a plan that does so anyway, they are reused instead: else the
    step would look as if it were free.
    """

    router: Router
    threshold: float
    is_hard: bool
    full: Collection[int] = ()
    errors: dict[int, list[float]] | None = None
    """Where given, the mean squared error of each step's calls against the full output is added."""
    _rows: list[list[bool]] | None = None

    @torch.no_grad()
    def compute(self, step: TransformerStep) -> Any:
        if not len(step.kept):
            return step.full()
        if self._rows is None:
            self._rows = self.router.rows_above(self.threshold)
        scores_B, row = self.router.scores(step.i), self._rows[step.i]
        if step.i in self.full:
            return step.planned([False] * len(row)) if self.is_hard and all(row) else step.full()
        target = step.plain() if self.errors is not None else None
        output = step.planned(row) if self.is_hard else step.mixed(scores_B, row)
        if self.errors is not None:
            error, count = squared_error(output, target)
            self.errors.setdefault(step.i, []).append(float(error) / count)
        return output


@dataclass
class SdtPolicy(Policy):
    """Measures what SDT learns from, along the trajectories of the parts of a batch.

    Each part is a call of the pipeline of its own. A row of the router acts on its own step alone, so that
    `update`, once all parts are through, makes of each row what an update at its step would have made.

    Rows of steps at which a call has nothing to reuse are fixed: they always compute.
    """

    trainer: SdtTrainer
    fixed: set[int] = field(default_factory=set)
    """Steps at which a call had nothing to reuse."""
    _rows: list[list[bool]] | None = None
    _scores: dict[int, Tensor] = field(default_factory=dict)
    _measured: dict[int, list[tuple[Tensor, Tensor, int]]] = field(default_factory=dict)

    @torch.no_grad()
    def compute(self, step: TransformerStep) -> Any:
        trainer = self.trainer
        if not len(step.kept):
            self.fixed.add(step.i)
            return step.full()
        if not trainer.trains(step.i):
            return step.full()
        scores_B = self._scores_of(step.i)
        assert self._rows is not None
        row = self._rows[step.i]
        is_hard = trainer.config.student == "hard"
        with trainer.stopwatch.measure("teacher"):
            target = step.plain()
        with torch.enable_grad():
            with trainer.stopwatch.measure("student"):
                output = step.mixed(scores_B, [False] * len(row) if is_hard else row)
            error, count = squared_error(output, target)
            with trainer.stopwatch.measure("backward"):
                (error_B,) = torch.autograd.grad(error, scores_B)
        self._measured.setdefault(step.i, []).append((error.detach(), error_B, count))
        return step.planned(row) if is_hard else detached(output)

    def _scores_of(self, i: int) -> Tensor:
        """Return the scores of step i, the same for all parts."""
        router, limit = self.trainer.router, self.trainer.config.clamp
        if self._rows is None:
            self._rows = self.trainer.refresh_rows(i)
            for row in router.rows[:i]:  # as the update of the first row clamps those still to come
                row.clamp_(-limit, limit)
        if i not in self._scores:
            with torch.enable_grad():
                self._scores[i] = router.scores(i)
        return self._scores[i]

    def update(
        self,
        lambda_T: Tensor,
        *,
        beta: float,
        average: Callable[[Tensor], None] | None = None,
        on_gradient: Callable[[int, Tensor], object] | None = None,
    ) -> list[StepRecord]:
        """Update every row that was measured, noisiest step first.

        Args:
            lambda_T: lambda_i of steps 0 ... T-2, (T-1,).
            average: averages a tensor over all workers in place; none on one worker.
            on_gradient: sees (i, gradient of row i (B,)) before the update.

        Returns:
            The records in the order of the steps; reading them waits for the device.
        """
        trainer, updates = self.trainer, list[Update]()
        for i in reversed(range(trainer.router.num_steps - 1)):
            if i in self.fixed:
                with torch.no_grad():
                    trainer.router.rows[i].fill_(FIXED_LOGIT)
            elif i in self._measured:
                measured, scores_B = self._measured[i], self._scores[i]
                updates.append(
                    trainer.update(
                        i,
                        scores_B,
                        measured,
                        lambda_T[i],
                        beta=beta,
                        average=average,
                        on_gradient=on_gradient,
                    )
                )
        return records_of(updates)


def squared_error(output: Any, target: Any) -> tuple[Tensor, int]:
    """Return the sum of squared differences of all tensors, and their number.

    The sum is in float32 or better.
    """
    pairs = list(zip(tensors_of(_values(output)), tensors_of(_values(target)), strict=True))
    errors = [(precise(ours) - precise(theirs)).square().sum() for ours, theirs in pairs]
    return torch.stack(errors).sum(), sum(ours.numel() for ours, _ in pairs)


def _values(output: Any) -> Any:
    """Return an output's tensors: diffusers' classes of outputs are dictionaries."""
    return output.to_tuple() if hasattr(output, "to_tuple") else output


def precise(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 or better."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def detached(output: Any) -> Any:
    """Return a structure of tensors without their graph."""
    return _pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)
