"""Fit the weights of a plan's forecasts and of its output's correction.

They are fitted so that the final image is right.

The router decides when a branch is reused, and the forecast its output then: `v1 + w1 (v1 - v2) +
w2 (v2 - v3)` of its last computed values, with weights w of each entry's own. The correction then mends the
model's output, at computed steps too (`harmonica.core.correction`). The fit begins at linear forecasts and,
where steps are not few, the fixed correction, as `harmonica.EvenSteps` has them. Near the present weights,
the change of the final latents is linear in them (`forecast_sketch`), and a damped Gauss-Newton step takes
them to the least squares (Levenberg and Marquardt; Nocedal and Wright 2006, 10.3).
How much it is damped is found by trying: fresh images are generated under the solution for each ridge, and
the nearest are kept. The linear prediction itself overrates large moves. Each image counts by its own error,
so that the few that a plan hurts most do not decide for all. No images are needed, and the base model stays
frozen.

The paper has none; `tests/benchmarks/RESULTS.md` lists its effect.
Shapes: N images, M model rows, C H W image, P weights, R = N * probes rows of the least squares.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harmonica.core.plan import Plan
from harmonica.training.backend import TrajectoryBackend
from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.plans.fitted_weights import (
    OUTPUT,
    FittedWeights,
    first_correction,
    linear_weights,
    unknowns,
)
from harmonica.training.plans.least_squares import FIT_RIDGES, NormalEquations, penalty_of
from harmonica.training.plans.selection import SMALLEST_ERROR, PlanSelector, mean_log_of, psnr_of

_PRESENT = "present"
"""Name of the weights that a round begins with, in its trial."""
_UNMOVED = 1e6
"""The ridge that is logged where the weights stay: any as large moves nothing."""


def full_latents(backend: TrajectoryBackend, batches: Sequence[Any]) -> list[Tensor]:
    """Return the full latents (N, ...) of each part of a batch, for fits of any plan."""
    # Copies, since what inference mode has made takes no part in a backward pass.
    return [backend.images(batch).clone() for batch in batches]


class ForecastFit:
    """The Gauss-Newton fit of one plan's weights."""

    def __init__(self, plan: Plan, config: ForecastConfig) -> None:
        """Begin with linear forecasts and, where steps are not few, the fixed correction.

        The forecasts are of the plan's branches, or of its segments.
        """
        self.plan, self.config = plan, config
        self.trajectories = 0
        self._reached: tuple[float, int] = (0.0, 0)
        """The sum over trajectories of the mean logarithms of errors with the present weights, and their
        number."""
        self._begin(FittedWeights(linear_weights(plan, config.order), first_correction(plan, config)))

    def _begin(self, weights: FittedWeights) -> None:
        self.weights = weights
        self.unknowns = unknowns(self.plan, self.config.order, weights.correction_TJ.shape[1])
        self._begin_round()

    def _begin_round(self) -> None:
        self._sums = NormalEquations(len(self.unknowns))
        self._trial: PlanSelector | None = None

    def planned(self) -> Plan:
        """Return the plan with the present weights."""
        return self.weights.of(self.plan)

    @property
    def reached_psnr(self) -> float:
        """Return the mean PSNR in dB of all images with the present weights.

        They are those of the trial in which the weights were found, and what the next round has measured.
        NaN in the first round.
        """
        total, trajectories = self._reached
        return psnr_of(total / trajectories) if trajectories else math.nan

    def observe(
        self,
        backend: TrajectoryBackend,
        batches: Sequence[Any],
        average: Callable[[Tensor], None],
        full: Sequence[Tensor] | None = None,
    ) -> dict[str, float]:
        """Measure one batch, given in parts, or try solutions on it; returns the metrics.

        Where a round ends, the weights become those of the nearest solution.

        `loss` is the mean squared change of the final latents.

        Args:
            full: the full latents of each part (N, ...), as `full_latents` returns them; by default they are
                generated.
        """
        place = self.trajectories
        self.trajectories += 1
        full = full or full_latents(backend, batches)
        if not self.config.is_tried(place):
            return self._add(backend, batches, full, average)
        metrics = self._try(backend, batches, full, average)
        if self.config.ends_round(self.trajectories):
            metrics |= self._end_round()
        return metrics

    def _add(
        self,
        backend: TrajectoryBackend,
        batches: Sequence[Any],
        full: Sequence[Tensor],
        average: Callable[[Tensor], None],
    ) -> dict[str, float]:
        """Add a batch's images to the normal equations."""
        count = len(self.unknowns)
        # Matrix and right side of the normal equations; below them the mean error and its mean logarithm.
        sums = torch.zeros(count + 2, count + 1, dtype=torch.float64, device=backend.device)
        num_images = sum(map(len, batches))
        for batch, full_NX in zip(batches, full, strict=True):
            sums += self._measure(backend, batch, full_NX) / num_images
        average(sums)
        sums = sums.cpu()
        self._sums.add(sums[:-2, :-1], sums[:-2, -1])
        error, mean_log = sums[-2:, -1].tolist()
        if self._reached[1]:
            self._reached = (self._reached[0] + mean_log, self._reached[1] + 1)
        # A run whose sums are not finite stops and says why, before it solves for anything.
        return {"loss": error if sums.isfinite().all() else math.nan}

    def _try(
        self,
        backend: TrajectoryBackend,
        batches: Sequence[Any],
        full: Sequence[Tensor],
        average: Callable[[Tensor], None],
    ) -> dict[str, float]:
        """Compare the present weights with the solutions, on images not measured."""
        self._trial = self._trial or self._new_trial()
        return {"loss": self._trial.observe(backend, batches, average, full=full)["loss"]}

    def _new_trial(self) -> PlanSelector:
        plans = {_PRESENT: self.planned()}
        plans |= {f"{ridge:g}": weights.of(self.plan) for ridge, weights in self._solutions().items()}
        return PlanSelector(plans, "forecast")

    def _solutions(self) -> dict[float, FittedWeights]:
        """Return what to try, by its ridge."""
        corrects = [branch == OUTPUT for _, branch, _ in self.unknowns]
        # Weights of a step and a difference move together, as far as the images do not tell them apart.
        places = ((i, k) for i, _, k in self.unknowns)
        penalty_PP = penalty_of(list(zip(places, corrects, strict=True)))
        found = {}
        for ridge in FIT_RIDGES if self.unknowns else ():
            moves = self._sums.solve(ridge, penalty_PP, corrects).tolist()
            found[ridge] = self.weights.moved(zip(self.unknowns, moves, strict=True))
        return found

    def _end_round(self) -> dict[str, float]:
        """Take the weights whose images are nearest, and begin a round around them."""
        assert self._trial is not None, "a round ends with a trajectory that tries"
        best, metrics = self._trial.best, dict[str, float]()
        self._reached = (self._trial.mean_log(best) * self._trial.trajectories, self._trial.trajectories)
        if self.unknowns:
            gain_db = self._trial.psnr(best) - self._trial.psnr(_PRESENT)
            ridge = _UNMOVED if best == _PRESENT else float(best)
            metrics = {"forecast.ridge": ridge, "forecast.promise": 10 ** (-gain_db / 10) - 1}
        if best != _PRESENT:
            self.weights = self._solutions()[float(best)]
        self._begin_round()
        return metrics

    def _measure(self, backend: TrajectoryBackend, batch: Any, full_NX: Tensor) -> Tensor:
        """Return the sums over a batch's images (P + 2, P + 1).

        They are of products and, in the last two rows, of errors and of their logarithms.
        """
        config = self.config
        plan = self.planned()
        seen = backend.sketch(
            plan,
            batch,
            full_NX,
            order=config.order,
            probes=config.probes,
            savings=config.savings,
        )
        weight_R = (1 / seen.error_N.clamp_min(SMALLEST_ERROR)).repeat(config.probes).double() / config.probes
        jacobian_RP = seen.jacobian_RP.double()
        weighted_PR = (jacobian_RP * weight_R[:, None]).T
        sides = torch.cat([weighted_PR @ jacobian_RP, (weighted_PR @ seen.residual_R.double())[:, None]], 1)
        last = sides.new_zeros(2, sides.shape[1])
        last[0, -1] = seen.error_N.sum()
        last[1, -1] = mean_log_of(seen.error_N) * len(seen.error_N)
        return torch.cat([sides, last])

    def state(self) -> dict[str, Any]:
        """Return the weights and the sums of the round for a checkpoint."""
        correction_TJ = self.weights.correction_TJ
        return {
            "weights": self.weights.forecast_TUK,
            "segments": self.plan.segments,
            **({"correction": correction_TJ} if correction_TJ.shape[1] else {}),
            "folds": [(self._sums.matrix_PP, self._sums.right_P)],
            "trial": self._trial.state() if self._trial else None,
            **({"reached": self._reached} if self._reached[1] else {}),
            "trajectories": self.trajectories,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned; sums that were kept in several parts are added up.

        A fit that an earlier version began, without a correction or with fewer differences, ends so.
        """
        # A fit that was begun by an earlier version ends without segments.
        self.plan = replace(self.plan, segments=state.get("segments"))
        self.trajectories = state["trajectories"]
        correction_TJ = state.get("correction", torch.zeros(self.plan.num_steps, 0)).double().cpu()
        self._begin(FittedWeights(state["weights"].cpu(), correction_TJ))
        self._reached = state.get("reached", self._reached)  # newer than some checkpoints
        for matrix_PP, right_P in state["folds"]:
            self._sums.add(matrix_PP.cpu(), right_P.cpu())
        if state.get("trial") is not None:
            self._trial = self._new_trial()
            self._trial.load_state(state["trial"])
