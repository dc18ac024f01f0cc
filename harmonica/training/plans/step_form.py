"""The quadratic form of the image change in the forecasts of reused steps.

To first order, the change of the final latents by reusing a set of steps is a sum of measured derivatives,
weighted by the coefficients of the steps' forecasts (`harmonica.training.plans.step_sketch`). So its size is
a quadratic form in these coefficients, and the best weights of a set solve a small least-squares problem,
with a ridge that keeps them near the linear forecast.

Ours; `tests/benchmarks/RESULTS.md` has what it is worth. Shapes: T steps, D distances, P = T * D pairs of a
reused step and a distance, K weights of a step, Q of all steps, U pairs in use, R rows.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmonica.core.plan import Plan, forecast_of
from harmonica.training.backend import TrajectoryBackend
from harmonica.training.plans.least_squares import ridge_solution

LINEAR = 1e6
"""The ridge that leaves forecasts linear."""
RIDGES = (0.5, 0.1, 3.0, LINEAR)
"""The ridges that a start is looked for under, relative to the mean diagonal; as a rule the first is best."""
_OF_PLANS = 0.1
"""The ridge of the forecasts with which plans are compared: about as free as the fit that follows.

A stiffer one takes even steps for steps that are 2 dB better once they are fitted (T = 20, 1.4x)."""
_REACH = 16
"""The largest distance over which a step is reused; more costs memory, and hardly time."""
_SMALLEST_CHANGE = 1e-24


def size_of_form(num_steps: int) -> int:
    """Return the number of pairs of a reused step and a distance, P."""
    return num_steps * min(_REACH, num_steps - 1)


class StepForm:
    """The quadratic form, summed over images, and what it says of sets of steps."""

    def __init__(self, num_steps: int, order: int, ridge: float = RIDGES[0]) -> None:
        """Begin with nothing measured.

        Args:
            order: number of weights of a forecast K; 0 where values are held.
            ridge: how much the weights are held at the linear forecast, where nothing else is said.
        """
        self.num_steps, self.order, self.ridge = num_steps, order, ridge
        self.reach, count = min(_REACH, num_steps - 1), size_of_form(num_steps)
        self.gram_PP = torch.zeros(count, count, dtype=torch.float64)

    def observe(
        self,
        backend: TrajectoryBackend,
        batches: Sequence[Any],
        probes: int,
        average: Callable[[Tensor], None],
    ) -> dict[str, float]:
        """Measure one batch, given in parts, and return the metrics to log.

        Each image is weighted by the inverse of the sum of its single changes, so that no few images decide.
        """
        gram_PP = torch.zeros_like(self.gram_PP, device=backend.device)
        loss = torch.zeros(1, dtype=torch.float64, device=gram_PP.device)
        count = sum(map(len, batches))
        for batch in batches:
            moved_RTD = backend.step_sketch(batch, reach=self.reach, probes=probes).double()
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
        """Return a plan with about the forecasts that it would be fitted.

        The branches of a step share them. A branch that is not reused in whole steps has those of a plan in
        which all branches are reused where it is.
        """
        if not self.order or not bool(self.gram_PP.any()):
            return plan
        ridge = self.ridge if self.ridge == LINEAR else _OF_PLANS
        weights_TBK = torch.zeros(plan.num_steps, plan.num_branches, self.order, dtype=torch.float64)
        branches: dict[frozenset[int], list[int]] = {}
        for branch, column in enumerate(zip(*plan.compute, strict=True)):
            reused = frozenset(i for i, is_computed in enumerate(column) if not is_computed)
            branches.setdefault(reused, []).append(branch)
        for steps, where in branches.items():
            _, names, weights = self._solve(steps, ridge)
            for (i, k), weight in zip(names, weights, strict=True):
                weights_TBK[i, where, k] = float(weight)
        return Plan(plan.compute, forecast_of(weights_TBK))

    def _solve(
        self, steps: frozenset[int], ridge: float
    ) -> tuple[float, list[tuple[int, int]], "np.ndarray[Any, Any]"]:
        """Return the least cost, and the weights that have it.

        There is one of each step and difference, under its name.
        """
        gram_PP = self.gram_PP.numpy()
        first: list[int] = []  # the pairs of the last value that each step has
        pairs: list[tuple[int, int]] = []  # of the newer and the older value of each difference
        names: list[tuple[int, int]] = []
        linear: list[float] = []
        for i in sorted(steps):
            reach = range(1, 1 + min(self.reach, self.num_steps - 1 - i))
            sources = [d for d in reach if i + d not in steps][: 1 + self.order]
            if not sources:
                return np.inf, [], np.zeros(0)
            place = i * self.reach - 1
            first.append(place + sources[0])
            for k, (newer, older) in enumerate(pairwise(sources)):
                pairs.append((place + newer, place + older))
                names.append((i, k))
                linear.append(sources[0] / (older - newer) if k == 0 else 0.0)
        used, places = np.unique(
            np.array([*first, *(p for pair in pairs for p in pair)]), return_inverse=True
        )
        count, firsts = len(pairs), len(first)
        differences_UQ = np.zeros((len(used), count))
        differences_UQ[places[firsts::2], range(count)] = 1.0
        differences_UQ[places[firsts + 1 :: 2], range(count)] = -1.0
        start_U = differences_UQ @ np.array(linear, dtype=float)
        start_U[places[:firsts]] += 1.0  # each step has its own
        gram_UU = gram_PP[np.ix_(used, used)]
        moved_UQ = gram_UU @ differences_UQ
        matrix_QQ, right_Q = differences_UQ.T @ moved_UQ, moved_UQ.T @ start_U
        cost = float(start_U @ gram_UU @ start_U)
        if not count:  # each step has a single value to hold
            return max(0.0, cost), names, np.zeros(0)
        change_Q = ridge_solution(
            torch.from_numpy(matrix_QQ),
            torch.from_numpy(right_Q),
            ridge,
            torch.eye(count, dtype=torch.float64),
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
