"""The quadratic form of the image change in the forecasts of reused steps.

To first order, the change of the final latents by reusing a set of steps is a sum of measured derivatives,
weighted by the coefficients of the steps' forecasts and of the corrections of the model's output
(`harmonica.training.plans.step_sketch`). So its size is a quadratic form in these coefficients, and the best
weights of a set solve a small least-squares problem, with a ridge that keeps them near the linear forecast.

Ours; `tests/benchmarks/RESULTS.md` has what it is worth. Shapes: T steps, D distances that branches are
reused over, J distances to the outputs that correct one, P = T * (D + J) pairs of a step and a distance,
K weights of a step's forecast, F reused steps, Q unknowns of all steps, U = F + 2 Q, R rows.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmonica.core.plan import Plan, correction_of, forecast_of
from harmonica.training.backend import TrajectoryBackend
from harmonica.training.memory_savings import NO_SAVINGS, MemorySavings
from harmonica.training.plans.least_squares import ridge_solution

LINEAR = 1e6
"""The ridge that leaves forecasts linear."""
SEARCH_RIDGES = (0.5, 0.1, 3.0, LINEAR)
"""The ridges that a start is looked for under, relative to the mean diagonal; as a rule the first is best."""
_OF_PLANS = 0.1
"""The ridge of the forecasts with which plans are compared: about as free as the fit that follows.

A stiffer one takes even steps for steps that are 2 dB better once they are fitted (T = 20, 1.4x)."""
_REACH = 16
"""The largest distance over which a step is reused; more costs memory, and hardly time."""
_SMALLEST_CHANGE = 1e-24


def size_of_form(num_steps: int, corrections: int) -> int:
    """Return the number of pairs of a step and a distance, P.

    Args:
        corrections: number of differences that correct an output, J.
    """
    return num_steps * (min(_REACH, num_steps - 1) + corrections)


class StepForm:
    """The quadratic form, summed over images, and what it says of sets of steps."""

    def __init__(
        self,
        num_steps: int,
        order: int,
        ridge: float = SEARCH_RIDGES[0],
        *,
        corrections: int = 0,
        segments: bool = False,
    ) -> None:
        """Begin with nothing measured.

        Args:
            order: number of weights of a forecast K; 0 where values are held.
            ridge: how much the weights are held at the linear forecast, where nothing else is said.
            corrections: number of differences that correct an output, J.
            segments: measure what branches add together, and not each branch's value.
        """
        self.num_steps, self.order, self.ridge, self.corrections = num_steps, order, ridge, corrections
        self.segments = segments
        self.reach, count = min(_REACH, num_steps - 1), size_of_form(num_steps, corrections)
        self.gram_PP = torch.zeros(count, count, dtype=torch.float64)

    def observe(
        self,
        backend: TrajectoryBackend,
        batches: Sequence[Any],
        probes: int,
        average: Callable[[Tensor], None],
        *,
        savings: MemorySavings = NO_SAVINGS,
    ) -> dict[str, float]:
        """Measure one batch, given in parts, and return the metrics to log.

        Each image is weighted by the inverse of the sum of its single changes, so that no few images decide.
        """
        gram_PP = torch.zeros_like(self.gram_PP, device=backend.device)
        loss = torch.zeros(1, dtype=torch.float64, device=gram_PP.device)
        count = sum(map(len, batches))
        for batch in batches:
            moved_RTD = backend.step_sketch(
                batch,
                reach=self.reach,
                corrections=self.corrections,
                probes=probes,
                segments=self.segments,
                savings=savings,
            ).double()
            # At distance 1 are the changes of each step alone, held. The rows of a probe are all images.
            alone_R = moved_RTD[:, :, 0].square().sum(1)
            scale_R = alone_R.unflatten(0, (-1, len(batch))).mean(0).repeat(probes)
            moved_RP = moved_RTD.flatten(1) / (probes * scale_R.clamp_min(_SMALLEST_CHANGE))[:, None].sqrt()
            gram_PP += moved_RP.T @ moved_RP / count
            loss += alone_R.mean() / self.num_steps * len(batch) / count
        average(gram_PP)
        average(loss)
        self.gram_PP += gram_PP.cpu()
        return {"loss": float(loss)}

    def cost(self, steps: Iterable[int], ridge: float | None = None) -> float:
        """Return the squared change by reuse of these steps.

        The penalty of their weights is part of it. It is relative to the sum of all single ones, and infinite
        where a step has nothing in reach.
        """
        return self._solve(frozenset(steps), self.ridge if ridge is None else ridge)[0]

    def with_forecast(self, plan: Plan) -> Plan:
        """Return a plan with about the weights that it would be fitted.

        The branches of a step share them. A branch that is not reused in whole steps has those of a plan in
        which all branches are reused where it is; the correction is that of the steps that most branches
        share.
        """
        if not self.order or not bool(self.gram_PP.any()):
            return replace(plan, segments=None)  # linear forecasts are nearer of each branch alone
        ridge = self.ridge if self.ridge == LINEAR else _OF_PLANS
        weights_TBK = torch.zeros(plan.num_steps, plan.num_branches, self.order, dtype=torch.float64)
        branches: dict[frozenset[int], list[int]] = {}
        for branch, column in enumerate(zip(*plan.compute, strict=True)):
            reused = frozenset(i for i, is_computed in enumerate(column) if not is_computed)
            branches.setdefault(reused, []).append(branch)
        correction_TJ = torch.zeros(plan.num_steps, self.corrections, dtype=torch.float64)
        for steps, where in sorted(branches.items(), key=lambda each: len(each[1])):
            _, names, weights = self._solve(steps, ridge)
            correction_TJ.zero_()
            for (i, k, corrects), weight in zip(names, weights, strict=True):
                if corrects:
                    correction_TJ[i, k] = float(weight)
                else:
                    weights_TBK[i, where, k] = float(weight)
        correction = correction_of(correction_TJ) if self.corrections else None
        return Plan(plan.compute, forecast_of(weights_TBK), correction, plan.segments)

    def _solve(
        self, steps: frozenset[int], ridge: float
    ) -> tuple[float, list[tuple[int, int, bool]], "np.ndarray[Any, Any]"]:
        """Return the least cost, and the weights that have it.

        There is one of each step and difference, under its name, which also says whether it corrects the
        output.
        """
        gram_PP = self.gram_PP.numpy()
        first: list[int] = []  # the pairs of the last value that each step has
        pairs: list[tuple[int, int]] = []  # of the newer and the older value of each difference
        names: list[tuple[int, int, bool]] = []
        linear: list[float] = []
        stride = self.reach + self.corrections
        for i in sorted(steps):
            reach = range(1, 1 + min(self.reach, self.num_steps - 1 - i))
            sources = [d for d in reach if i + d not in steps][: 1 + self.order]
            if not sources:
                return np.inf, [], np.zeros(0)
            place = i * stride - 1
            first.append(place + sources[0])
            for k, (newer, older) in enumerate(pairwise(sources)):
                pairs.append((place + newer, place + older))
                names.append((i, k, False))
                linear.append(sources[0] / (older - newer) if k == 0 else 0.0)
        outputs: list[tuple[int, int]] = []
        for i in range(1 + max(steps, default=-1)):
            for k in range(min(self.corrections, self.num_steps - 1 - i)):
                place = i * stride + self.reach + k
                outputs.append((place - 1 if k else place, place))  # the first moves away from one alone
                names.append((i, k, True))
        pairs += outputs
        linear += [0.0] * len(outputs)
        # The form in the unknowns is that in the newer pairs minus that in the older ones. It is gathered:
        # products with a matrix of differences cost more, above all where numpy's take several threads.
        count, first_F = len(pairs), np.array(first, dtype=np.intp)
        newer_Q, older_Q = np.array(pairs, dtype=np.intp).reshape(-1, 2).T
        is_two_Q = (newer_Q != older_Q).astype(float)  # a single pair counts as the older alone
        linear_Q = np.array(linear)
        start_U = np.concatenate([np.ones(len(first)), is_two_Q * linear_Q, -linear_Q])
        used_U = np.concatenate([first_F, newer_Q, older_Q])
        in_start = start_U != 0
        moved_U = gram_PP[np.ix_(used_U, used_U[in_start])] @ start_U[in_start]
        moved_newer_Q, moved_older_Q = moved_U[len(first) :].reshape(2, -1)
        cost, right_Q = float(start_U @ moved_U), is_two_Q * moved_newer_Q - moved_older_Q
        mixed_QQ = is_two_Q[:, None] * gram_PP[np.ix_(newer_Q, older_Q)]
        matrix_QQ = np.outer(is_two_Q, is_two_Q) * gram_PP[np.ix_(newer_Q, newer_Q)]
        matrix_QQ += gram_PP[np.ix_(older_Q, older_Q)] - mixed_QQ - mixed_QQ.T
        if not count:  # each step has a single value to hold
            return max(0.0, cost), names, np.zeros(0)
        change_Q = ridge_solution(
            torch.from_numpy(matrix_QQ),
            torch.from_numpy(right_Q),
            ridge,
            torch.eye(count, dtype=torch.float64),
            [corrects for *_, corrects in names],
        ).numpy()
        # Rounded, so that the search goes the same way on processors that round differently.
        least = float(f"{max(0.0, cost + float(right_Q @ change_Q)):.9g}")
        return least, names, np.array(linear) + change_Q

    def state(self) -> Tensor:
        """Return the form (P, P) for a checkpoint."""
        return self.gram_PP

    def load_state(self, state: Tensor) -> None:
        """Load what `state` returned.

        The form of a version before is of another kind. It is left out, since the starts were made of it.
        """
        if state.shape == self.gram_PP.shape:
            self.gram_PP = state.cpu()
