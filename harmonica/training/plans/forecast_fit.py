"""Fit forecast weights, from which reused branches compute their output.

They are fitted so that the final image is right.

The router decides when a branch is reused, and the forecast its output then: `v1 + w1 (v1 - v2) +
w2 (v2 - v3)` of its last computed values, with weights w of each entry's own. They are fitted to the image:
the change of the final latents is close to linear in w, so that a few Gauss-Newton steps find the least
squares. Its residuals and Jacobian are seen through random probes u: one backward pass along a planned
trajectory gives `u . dx_0/dw` of all entries at once. Each image counts by its own error, so that the few
that a plan hurts most do not decide for all. No images are needed, and the base model stays frozen.

The paper has none; `tests/benchmarks/RESULTS.md` lists its effect.
Shapes: N images, M model rows, C H W image, P weights, R = N * probes rows of the least squares.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from harmonica.core.cache import BranchCache
from harmonica.core.plan import Forecast, Plan, forecast_of
from harmonica.core.sampling import sample
from harmonica.core.trajectory import planned_step
from harmonica.data.batch import Batch
from harmonica.execution.values import KeptValues, extrapolate
from harmonica.samplers import Sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.backend import Sketch, TrajectoryBackend
from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.plans.least_squares import RIDGES, NormalEquations, penalty_of
from harmonica.training.plans.selection import PlanSelector

_SMALLEST_ERROR = 1e-12
_PRESENT = "present"
"""Name of the weights that a round begins with, in its trial."""
_UNMOVED = 1e6
"""The ridge that is logged where the weights stay: any as large moves nothing."""


Unknown = tuple[int, int, int]
"""An unknown weight: step, branch and number of the difference."""


def unknowns(plan: Plan, order: int) -> list[Unknown]:
    """Return the weights to fit.

    A reused entry has as many as it has earlier values.
    """
    found: list[Unknown] = []
    computed = [0] * plan.num_branches
    for i in reversed(range(plan.num_steps)):
        for branch, is_computed in enumerate(plan.compute[i]):
            if is_computed:
                computed[branch] += 1
            else:
                found += [(i, branch, k) for k in range(min(order, computed[branch] - 1))]
    return found


def linear_weights(plan: Plan, order: int) -> Tensor:
    """Return the weights (T, B, order) of the linear forecast.

    The fit starts from them.
    """
    weights_TBK = torch.zeros(plan.num_steps, plan.num_branches, order, dtype=torch.float64)
    for branch in range(plan.num_branches):
        last = before = -1
        for i in reversed(range(plan.num_steps)):
            if plan.compute[i][branch]:
                last, before = i, last
            elif before > 0:
                weights_TBK[i, branch, 0] = (last - i) / (before - last)
    return weights_TBK


class ProbedCache(BranchCache):
    """A cache that is differentiable in every forecast weight of every image."""

    def __init__(self, num_branches: int, learned: Forecast | None) -> None:
        super().__init__(num_branches, "forecast", learned)
        self.handles: dict[Unknown, Tensor] = {}
        """Of each weight that was used, zeros (M,) of the rows."""

    def write(self, branch: int, step: int, value: Tensor) -> None:
        self._keep(branch, step, value)

    def read(self, branch: int, step: int) -> Tensor:
        values = [value for _, value in self._kept[branch]]
        forecast = extrapolate(values, self.weights(branch, step) if len(values) > 1 else ())
        for k, (newer, older) in enumerate(pairwise(values)):
            # A zero that is added: its gradient, in float32, is what moving the weight would do.
            handle_M = torch.zeros(len(forecast), device=forecast.device, requires_grad=True)
            difference = (newer - older).detach().float()
            forecast = forecast + (handle_M.view(-1, *[1] * (difference.ndim - 1)) * difference).to(
                forecast.dtype
            )
            self.handles[step, branch, k] = handle_M
        return forecast

    def kept(self, branch: int, step: int) -> KeptValues:
        return KeptValues.of([self.read(branch, step)], ())


def sketch_image_error(
    sampler: Sampler,
    plan: Plan,
    batch: Batch,
    *,
    order: int,
    probes: int,
) -> Sketch:
    """Linearise the change from full to planned latents in the forecast weights.

    Args:
        plan: with forecast weights, around which the change is linearised.
        batch: with keys, which also determine the probes, so that these do not depend on the worker.
    """
    assert batch.keys is not None, "training's samples have keys"
    full_NCHW = sample(sampler, batch.noise_NCHW, batch.condition_N, keys=batch.keys).clone()
    cache = ProbedCache(plan.num_branches, plan.forecast)
    with torch.enable_grad():
        state = batch.start(sampler)
        for i in reversed(range(plan.num_steps)):
            state, _ = planned_step(sampler, i, state, plan.compute[i], cache)
        images_NCHW = sampler.finish(state)
    handles = {name: [handle_M] for name, handle_M in cache.handles.items()}
    return sketch_of(
        full_NCHW, images_NCHW, handles, unknowns(plan, order), batch.keys, plan.num_steps, probes
    )


def sketch_of(
    full_NX: Tensor,
    images_NX: Tensor,
    handles: Mapping[Unknown, Sequence[Tensor]],
    names: Sequence[Unknown],
    keys: SampleKeys,
    num_steps: int,
    probes: int,
) -> Sketch:
    """Project the change of the latents on random probes, and differentiate it.

    Args:
        full_NX: the full sampler's latents (N, ...).
        images_NX: those under the plan, with the graph of the handles.
        handles: of each weight, zeros (M,) that were added, M being rows of images, as often as it takes.
        names: the weights to differentiate in; one without handles had nothing to weigh.
        keys: of the images; they determine the probes.
    """
    change_NX = images_NX.detach() - full_NX
    size, count = change_NX[0].numel(), len(full_NX)
    flat = [handle_M for name in names for handle_M in handles.get(name, ())]
    residuals, jacobians = [], []
    for probe in range(probes):
        # Steps from T on are nobody's noise.
        drawn = torch.from_numpy(keys.step_noise(num_steps + probe, tuple(change_NX.shape[1:])))
        u_NX = drawn.to(change_NX) / size**0.5
        residuals.append((change_NX * u_NX).flatten(1).sum(1))
        moved: list[Tensor] = []
        if flat:  # else nothing is reused that has two values before it
            moved = list(
                torch.autograd.grad(
                    (images_NX * u_NX).sum(), flat, retain_graph=probe < probes - 1, materialize_grads=True
                )
            )
        columns = []
        for name in names:
            # Guidance has two rows an image, or two calls, with one weight.
            rows = [moved.pop(0).unflatten(0, (-1, count)).sum(0) for _ in handles.get(name, ())]
            columns.append(torch.stack(rows).sum(0) if rows else change_NX.new_zeros(count))
        jacobians.append(torch.stack(columns, 1) if columns else change_NX.new_zeros(count, 0))
    return Sketch(change_NX.square().flatten(1).mean(1), torch.cat(residuals), torch.cat(jacobians))


class ForecastFit:
    """The Gauss-Newton fit of one plan's forecast weights."""

    def __init__(self, plan: Plan, config: ForecastConfig) -> None:
        self.plan, self.config = plan, config
        self.unknowns = unknowns(plan, config.order)
        self.weights_TBK = linear_weights(plan, config.order)
        self.trajectories = 0
        self._begin_round()

    def _begin_round(self) -> None:
        self._sums = NormalEquations(len(self.unknowns))
        self._trial: PlanSelector | None = None
        self._tried: dict[str, Tensor] = {}

    def planned(self) -> Plan:
        """Return the plan with the present weights."""
        return Plan(self.plan.compute, forecast_of(self.weights_TBK))

    def observe(
        self, backend: TrajectoryBackend, batches: Sequence[Any], average: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """Measure one batch, given in parts, or try solutions on it; returns the metrics.

        Where a round ends, the weights become those of the nearest solution.

        `loss` is the mean squared change of the final latents.
        """
        place = self.trajectories
        self.trajectories += 1
        if not self.config.is_tried(place):
            return self._add(backend, batches, average)
        metrics = self._try(backend, batches, average)
        if self.config.ends_round(self.trajectories):
            metrics |= self._end_round()
        return metrics

    def _add(
        self, backend: TrajectoryBackend, batches: Sequence[Any], average: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """Add a batch's images to the normal equations."""
        count = len(self.unknowns)
        # Matrix and right side of the normal equations, and below them the mean error.
        sums = torch.zeros(count + 1, count + 1, dtype=torch.float64, device=backend.device)
        num_images = sum(map(len, batches))
        for batch in batches:
            sums += self._measure(backend, batch) / num_images
        average(sums)
        sums = sums.cpu()
        self._sums.add(sums[:-1, :-1], sums[:-1, -1])
        # A run whose sums are not finite stops and says why, before it solves for anything.
        return {"loss": float(sums[-1, -1]) if sums.isfinite().all() else math.nan}

    def _try(
        self, backend: TrajectoryBackend, batches: Sequence[Any], average: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """Compare the present weights with the solutions for every ridge, on images not measured."""
        self._trial = self._trial or self._new_trial()
        return {"loss": self._trial.observe(backend, batches, average)["loss"]}

    def _new_trial(self) -> PlanSelector:
        self._tried = {_PRESENT: self.weights_TBK}
        # Weights of a step and a difference move together, as far as the images do not tell them apart.
        penalty_PP = penalty_of([(i, k) for i, _, k in self.unknowns])
        for ridge in RIDGES if self.unknowns else ():
            weights_TBK = self.weights_TBK.clone()
            moves = self._sums.solve(ridge, penalty_PP).tolist()
            for (i, branch, k), by in zip(self.unknowns, moves, strict=True):
                weights_TBK[i, branch, k] += by
            self._tried[f"{ridge:g}"] = weights_TBK
        compute = self.plan.compute
        plans = {name: Plan(compute, forecast_of(weights)) for name, weights in self._tried.items()}
        return PlanSelector(plans, "forecast")

    def _end_round(self) -> dict[str, float]:
        """Take the weights whose images are nearest, and begin a round around them."""
        assert self._trial is not None, "a round ends with a trajectory that tries"
        best, metrics = self._trial.best, dict[str, float]()
        if self.unknowns:
            gain_db = self._trial.psnr(best) - self._trial.psnr(_PRESENT)
            ridge = _UNMOVED if best == _PRESENT else float(best)
            metrics = {"forecast.ridge": ridge, "forecast.promise": 10 ** (-gain_db / 10) - 1}
        self.weights_TBK = self._tried[best]
        self._begin_round()
        return metrics

    def _measure(self, backend: TrajectoryBackend, batch: Any) -> Tensor:
        """Return the sums of products over a batch's images (P + 1, P + 1)."""
        config = self.config
        seen = backend.sketch(self.planned(), batch, order=config.order, probes=config.probes)
        weight_R = (1 / seen.error_N.clamp_min(_SMALLEST_ERROR)).repeat(
            config.probes
        ).double() / config.probes
        jacobian_RP = seen.jacobian_RP.double()
        weighted_PR = (jacobian_RP * weight_R[:, None]).T
        sides = torch.cat([weighted_PR @ jacobian_RP, (weighted_PR @ seen.residual_R.double())[:, None]], 1)
        last = sides.new_zeros(1, sides.shape[1])
        last[0, -1] = seen.error_N.sum()
        return torch.cat([sides, last])

    def state(self) -> dict[str, Any]:
        """Return the weights and the sums of the round for a checkpoint."""
        return {
            "weights": self.weights_TBK,
            "folds": [(self._sums.matrix_PP, self._sums.right_P)],
            "trial": self._trial.state() if self._trial else None,
            "trajectories": self.trajectories,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned; sums that were kept in several parts are added up."""
        self.weights_TBK, self.trajectories = state["weights"].cpu(), state["trajectories"]
        self._begin_round()
        for matrix_PP, right_P in state["folds"]:
            self._sums.add(matrix_PP.cpu(), right_P.cpu())
        if state.get("trial") is not None:
            self._trial = self._new_trial()
            self._trial.load_state(state["trial"])
