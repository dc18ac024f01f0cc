"""Refine a plan of whole steps: move its computed steps, one place each.

The form of `harmonica.training.plans.search` is measured around the full trajectory and wants reused steps
that stand alone. Around a plan, the changes of the image by single moves nearly add up for any plan, also one
with runs of reuse. So a round measures each move of a computed step by one place, takes the moves that lower
the error most by the quadratic form of their effects, and tries the best sets on fresh images.

Ours; `tests/benchmarks/RESULTS.md` has what it is worth. Shapes: N images, X elements, M moves.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from harmonica.core.cache import BranchCache, Reuse
from harmonica.core.plan import Plan
from harmonica.core.trajectory import planned_end, planned_step
from harmonica.data.batch import Batch
from harmonica.samplers import Sampler, State
from harmonica.training.backend import TrajectoryBackend
from harmonica.training.plans.selection import PlanSelector

Move = tuple[int, int]
"""The step that is computed, and its neighbour that is computed in its place."""
_SMALLEST_ERROR = 1e-12
_LEAST_GAIN = 1e-3
"""Share of the error that a further move must take away."""


def moves_of(plan: Plan, fixed: Collection[int] = ()) -> list[Move]:
    """Return the moves of a plan's computed steps to reused neighbours.

    Steps of which a part is reused stay where they are.

    Args:
        fixed: steps that are computed in any case.
    """
    last = plan.num_steps - 1
    computed = [i for i in range(last) if all(plan.compute[i]) and i not in fixed]
    places = ((i, other) for i in computed for other in (i - 1, i + 1))
    return [(i, other) for i, other in places if 0 <= other < last and not any(plan.compute[other])]


def moved(plan: Plan, moves: Sequence[Move]) -> Plan:
    """Return the plan with the rows of each move exchanged.

    No two moves share a step.
    """
    rows = list(plan.compute)
    for one, other in moves:
        rows[one], rows[other] = rows[other], rows[one]
    return Plan(tuple(rows))


@torch.no_grad()
def plan_latents(sampler: Sampler, batch: Batch, plans: Sequence[Plan], reuse: Reuse) -> Tensor:
    """Return the final latents (P, N, X) under plans that begin like the first one.

    Each shares the run of the first plan until the step at which it differs.
    """
    first = plans[0]
    state, cache = batch.start(sampler), BranchCache(first.num_branches, reuse)
    before: dict[int, tuple[State, BranchCache]] = {}
    for i in reversed(range(first.num_steps)):
        before[i] = state, cache.copy()
        state, _ = planned_step(sampler, i, state, first.compute[i], cache)
    finals = [sampler.finish(state).flatten(1)]
    for plan in plans[1:]:
        differing = (i for i in reversed(range(plan.num_steps)) if plan.compute[i] != first.compute[i])
        begin = next(differing, 0)
        state, cache = before[begin]
        finals.append(planned_end(sampler, plan, state, cache.copy(), begin).flatten(1))
    return torch.stack(finals)


class PlanRefiner:
    """One round of refinement.

    It keeps the effects of a plan's moves, and then the trial of the best sets of them.
    """

    def __init__(self, plan: Plan, reuse: Reuse, fixed: Collection[int] = ()) -> None:
        self.plan, self.reuse = plan, reuse
        self.moves = moves_of(plan, fixed)
        count = len(self.moves) + 1
        self.gram_MM = torch.zeros(count, count, dtype=torch.float64)
        """Products of the plan's own error, which comes first, and of what each move adds to it."""
        self.trial: PlanSelector | None = None

    @torch.no_grad()
    def measure(
        self, backend: TrajectoryBackend, batches: Sequence[Any], average: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """Measure the moves on one batch, given in parts, and return the metrics to log.

        Each image is weighted by the inverse of its error under the plan, so that no few images decide.
        """
        gram_MM = torch.zeros_like(self.gram_MM, device=backend.device)
        loss = torch.zeros(1, dtype=torch.float64, device=gram_MM.device)
        count = sum(map(len, batches))
        plans = [self.plan, *(moved(self.plan, [move]) for move in self.moves)]
        for batch in batches:
            full_NX = backend.images(batch).flatten(1)
            changes_MNX = (backend.plan_latents(batch, plans, self.reuse) - full_NX).double()
            changes_MNX[1:] -= changes_MNX[:1].clone()
            error_N = changes_MNX[0].square().mean(1)
            scale_N = 1 / error_N.clamp_min(_SMALLEST_ERROR) / changes_MNX.shape[2]
            gram_MM += torch.einsum("inx,jnx,n->ij", changes_MNX, changes_MNX, scale_N) / count
            loss += error_N.sum() / count
        average(gram_MM)
        average(loss)
        self.gram_MM += gram_MM.cpu()
        return {"loss": float(loss)}

    def chosen(self) -> list[Move]:
        """Return moves that lower the error by the form.

        The best comes first, and no two share a step.
        """
        taken: list[int] = []
        total_M = self.gram_MM[0].clone()  # products with the sum of what is taken so far
        error = float(total_M[0])
        while True:
            steps = {step for place in taken for step in self.moves[place]}
            free = [k for k, move in enumerate(self.moves) if not steps & set(move)]
            gains = {k: -float(2 * total_M[k + 1] + self.gram_MM[k + 1, k + 1]) for k in free}
            best = max(gains, key=gains.__getitem__, default=None)
            if best is None or gains[best] <= _LEAST_GAIN * error:
                return [self.moves[place] for place in taken]
            taken.append(best)
            total_M += self.gram_MM[best + 1]
            error -= gains[best]

    def try_moves(
        self, backend: TrajectoryBackend, batches: Sequence[Any], average: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """Compare the plan with sets of its moves on fresh images.

        Returns the metrics to log.
        """
        self.trial = self.trial or self._new_trial()
        return {"loss": self.trial.observe(backend, batches, average)["loss"]}

    def _new_trial(self) -> PlanSelector:
        chosen = self.chosen()
        sizes = sorted({0, len(chosen)} | {2**k for k in range(len(chosen).bit_length())})
        return PlanSelector({str(size): moved(self.plan, chosen[:size]) for size in sizes}, self.reuse)

    @property
    def best(self) -> Plan:
        """Return the plan that was nearest in the trial."""
        return self.trial.plans[self.trial.best] if self.trial else self.plan

    @property
    def gain_db(self) -> float:
        """Return how much nearer it was than the plan that the round began with, in dB."""
        return self.trial.psnr(self.trial.best) - self.trial.psnr("0") if self.trial else 0.0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        trial = self.trial.state() if self.trial else None
        moves = torch.tensor(self.moves).reshape(-1, 2)
        return {"plan": self.plan.to_tensor(), "moves": moves, "gram": self.gram_MM, "trial": trial}

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` of a round with the same plan returned."""
        self.moves = [(one, other) for one, other in state["moves"].tolist()]
        self.gram_MM = state["gram"].cpu()
        if state["trial"] is not None:
            self.trial = self._new_trial()
            self.trial.load_state(state["trial"])
