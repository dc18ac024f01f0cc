"""The image error proxy (HarmoniCa's IEPO), lambda_i for each step i.

It says how much caching at step i hurts the final image.

Three kinds. `leave_one_out` is the paper's, `cumulative` the released code's. `sensitivity` is ours: the
leave-one-out change of the image divided by the step's own error, so that lambda_i * MSE_i is the image
error that step causes. The other two already contain the step's error, so a step at which little is
reused looks harmless, is pushed to reuse, and only looks harmful at the next refresh.

Runs that differ only from step i on share everything before it: each branches off from one main run when
that gets to step i, so a refresh costs (T+1)/2T of T full generations, and only two caches at a time.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from harmonica.core.cache import BranchCache
from harmonica.core.passes import soft_pass
from harmonica.core.router import Router
from harmonica.core.trajectory import full_step, planned_step
from harmonica.data.batch import Batch
from harmonica.samplers import Sampler, State
from harmonica.training.sdt_config import SdtConfig, Student

IepoKind = Literal["leave_one_out", "cumulative", "sensitivity"]
KINDS = get_args(IepoKind)
SMALLEST_ERROR = 1e-12  # of a step at which nothing is reused; keeps lambda finite


class _Generation:
    """One sampling under way: its state and its cache, which every step changes."""

    def __init__(
        self,
        sampler: Sampler,
        router: Router,
        refresh_rows: Sequence[Sequence[bool]],
        student: Student,
        state: State,
        cache: BranchCache,
    ) -> None:
        """Go on from a state and its cache.

        Args:
            refresh_rows: where the router's scores exceed tau (T x B).
        """
        self.sampler, self.router, self.refresh_rows, self.student = sampler, router, refresh_rows, student
        self.state, self.cache = state, cache

    @property
    def x_MCHW(self) -> Tensor:
        return self.state.x_MCHW

    def fork(self) -> "_Generation":
        """Return a copy that goes on from here by itself.

        What the two share is never written in place.
        """
        settings = (self.sampler, self.router, self.refresh_rows, self.student)
        return _Generation(*settings, self.state, self.cache.copy())

    def full_step(self, i: int) -> Tensor:
        """Run step i with the cache switched off (weights 1).

        The cache takes what was computed.

        Returns:
            The guided output (M, C, H, W).
        """
        everything = (True,) * self.router.num_branches
        self.state, guided = planned_step(self.sampler, i, self.state, everything, self.cache)
        return guided

    def other_step(self, i: int) -> Tensor:
        """Run the step that `soft_step` is compared with: step i with the cache off.

        Under a plan that computes all of step i that would be the same again, and say of the step that it is
        free: there it is reused, all of it.
        """
        if self.student == "hard" and all(self.refresh_rows[i]):
            nothing = (False,) * self.router.num_branches
            self.state, guided = planned_step(self.sampler, i, self.state, nothing, self.cache)
            return guided
        return self.full_step(i)

    def soft_step(self, i: int) -> Tensor:
        """Run step i under the soft weights, or their plan.

        Returns the guided output (M, C, H, W).
        """
        sampler = self.sampler
        scores_B = self.router.scores(i)
        refresh_row = self.refresh_rows[i]
        if self.student == "hard":
            self.state, guided = planned_step(sampler, i, self.state, refresh_row, self.cache)
            return guided
        hidden, conditioning = sampler.embed(i, self.state)
        guided = sampler.guide(
            soft_pass(sampler.model, hidden, conditioning, scores_B, refresh_row, self.cache, i)
        )
        self.state = sampler.advance(i, self.state, guided)
        return guided

    def finish_soft(self, first: int) -> Tensor:
        """Return the final latents (M, C, H, W) after soft steps `first` ... 0."""
        for i in range(first, -1, -1):
            self.soft_step(i)
        return self.x_MCHW

    def full_end(self, first: int) -> Tensor:
        """Return the final latents (M, C, H, W) of a run without a cache from here.

        Steps `first` ... 0 are in full.
        """
        sampler, state = self.sampler, self.state
        for i in range(first, -1, -1):
            state, _ = full_step(sampler, i, state)
        return state.x_MCHW


def image_error_proxy(
    sampler: Sampler,
    router: Router,
    batches: Sequence[Batch],
    *,
    kind: IepoKind,
    config: SdtConfig,
    average: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Return lambda (T-1,).

    It is the mean squared change of the final latents (paper Section 4.3).

    `leave_one_out` (the paper's): against x_0 with soft weights at every step, the cache is switched
    off at step i alone. `cumulative` (released code): from no caching at all, soft weights are switched
    on one step at a time, noisiest first; lambda_i is the change against the generation before.
    `sensitivity`: leave-one-out divided by the MSE between the soft and the full output of step i.

    Args:
        batches: what is generated at a time (`Batch.split`); lambda is that of all samples.
        config: threshold, reuse and student. With a hard student the router's plan takes the place of its
            soft weights, and a step that this computes in full is reused instead, by itself.
        average: averages a tensor over all workers in place, so that lambda is that of all their samples.
    """
    if kind not in KINDS:
        raise ValueError(f"iepo.kind is {kind!r}: give one of {', '.join(KINDS)}")
    changes = (
        (len(batch), image_changes(sampler, router, batch, kind=kind, config=config)) for batch in batches
    )
    return lambda_of(changes, kind, average)


def lambda_of(
    changes: Iterable[tuple[int, Tensor]], kind: IepoKind, average: Callable[[Tensor], None] | None = None
) -> Tensor:
    """Return lambda (T-1,) from what was measured of each part of the samples.

    Args:
        changes: the number of samples of each part, and the mean changes of their final latents and the
            steps' own errors (2, T-1).
        average: averages a tensor over all workers in place.
    """
    parts = list(changes)
    num_samples = sum(count for count, _ in parts)
    measured_2T = torch.stack([count / num_samples * each_2T for count, each_2T in parts]).sum(0)
    if average is not None:
        average(measured_2T)  # before the division: a mean of ratios would depend on who has which rows
    change_T: Tensor
    change_T, error_T = measured_2T
    return change_T / error_T.clamp_min(SMALLEST_ERROR) if kind == "sensitivity" else change_T


@torch.no_grad()  # not inference_mode: lambda enters a loss that is differentiated
def image_changes(
    sampler: Sampler, router: Router, batch: Batch, *, kind: IepoKind, config: SdtConfig
) -> Tensor:
    """Return the image changes of a batch and the steps' own errors (2, T-1).

    The changes are mean squared ones of the final latents.
    """
    cache = BranchCache(router.num_branches, config.reuse)
    refresh_rows = router.rows_above(config.threshold)  # read back once, not at each step of each run
    main = _Generation(sampler, router, refresh_rows, config.student, batch.start(sampler), cache)
    return _cumulative(main) if kind == "cumulative" else _leave_one_out(main)


def _leave_one_out(main: _Generation) -> Tensor:
    """Return (2, T-1): the final latents' change, and each step's own error.

    The change is the one that step i in full makes.
    """
    last = main.sampler.num_steps - 1
    main.full_step(last)
    finals: list[Tensor] = []
    errors: list[Tensor] = []
    for i in range(last - 1, -1, -1):
        other = main.fork()
        errors.insert(0, _mean_squared(other.other_step(i), main.soft_step(i)))
        finals.insert(0, other.finish_soft(i - 1))
    changes = [_mean_squared(final, main.x_MCHW) for final in finals]
    return torch.stack([torch.stack(changes), torch.stack(errors)])


def _cumulative(main: _Generation) -> Tensor:
    """Return (2, T-1): the final latents' change as step i turns soft too, and zeros."""
    last = main.sampler.num_steps - 1
    main.full_step(last)
    changes: list[Tensor] = []
    previous = main.full_end(last - 1)
    for i in range(last - 1, -1, -1):
        main.soft_step(i)
        current = main.full_end(i - 1)
        changes.insert(0, _mean_squared(current, previous))
        previous = current
    change_T = torch.stack(changes)
    return torch.stack([change_T, torch.zeros_like(change_T)])


def _mean_squared(ours: Tensor, other: Tensor) -> Tensor:
    return (ours - other).square().mean()
