"""The phase that fits the forecasts and the output's correction.

So it decides between the plans that the choice has found nearest.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from harmonica.training.config import TrainingConfig
from harmonica.training.context import TrainingContext
from harmonica.training.memory_savings import advised
from harmonica.training.phase import Phase, assumed_speedup
from harmonica.training.plans.forecast_fit import ForecastFit, full_latents
from harmonica.training.plans.least_squares import FIT_RIDGES


class ForecastPhase(Phase):
    """Fit of the final plan's forecasts; its weights stay for the artifact.

    At first it fits the plans that the choice has found nearest, since a fit is worth more to some steps than
    to others. The one whose images are nearest after the first round goes on (`ForecastConfig.compared`).
    """

    name, state_key = "forecast", "forecast"

    def __init__(self, context: TrainingContext) -> None:
        super().__init__(context)
        self.fits: dict[str, ForecastFit] = {}
        """The weights of each plan that is fitted, by its name; the nearest is first."""

    @property
    def fit(self) -> ForecastFit | None:
        """Return the weights of the plan that the router has; None before the phase."""
        return next(iter(self.fits.values()), None)

    @staticmethod
    def costs(config: TrainingConfig, num_steps: int, *, from_start: bool = False) -> list[float]:
        """Count a full trajectory, planned ones, and a backward for each probe.

        The latter count for each plan that is fitted. A trajectory that tries solutions runs the plan with
        each of them instead.
        """
        forecast, costs = config.forecast, []
        for place in range(forecast.trajectories):
            backward = forecast.probes * (1 + forecast.activation_checkpointing)
            planned = 1 + (len(FIT_RIDGES) if forecast.is_tried(place) else backward)
            fits = forecast.finalists if config.choice_trajectories and place < forecast.compared else 1
            costs.append(1 + fits * planned / assumed_speedup(config))
        return costs

    def begin(self) -> None:
        context = self.context
        finalists = context.finalists or {context.chosen: context.router.logits()}
        self.fits = {
            name: ForecastFit(context.in_segments(context.target.plan_of(logits_TB)), self.config.forecast)
            for name, logits_TB in finalists.items()
        }

    def step(self, batch: Any, average: Callable[[Tensor], None]) -> dict[str, float]:
        size = self.config.micro_batch_size or self.config.forecast.rows_at_once
        batches = batch.split(size)
        backend = self.context.backend
        with self.context.sdt.stopwatch.measure("forecast"), advised(*self.context.cures):
            full = full_latents(backend, batches)
            # Those of the first are logged.
            metrics, *_ = [fit.observe(backend, batches, average, full) for fit in self.fits.values()]
        if len(self.fits) > 1 and self.done + 1 == self.config.forecast.compared:
            metrics |= self._keep_nearest()
        return metrics

    def _keep_nearest(self) -> dict[str, float]:
        """Set the router to the plan whose images are nearest.

        Those are images with the weights of the first round. The other plans are left.
        """
        context, fits = self.context, self.fits
        metrics = {f"finalist.{name}_psnr": fit.reached_psnr for name, fit in fits.items()}
        best = max(fits, key=lambda name: fits[name].reached_psnr)
        context.set_router(context.finalists[best])
        context.chosen, context.finalists, self.fits = best, {}, {best: fits[best]}
        return metrics

    def state(self) -> dict[str, Any] | None:
        if self.fit is None:
            return None
        others = {name: fit.state() for name, fit in [*self.fits.items()][1:]}
        return self.fit.state() | ({"others": others} if others else {})

    def load_state(self, state: dict[str, Any]) -> None:
        self.begin()
        states = [state, *state.get("others", {}).values()]  # in the order of the finalists
        for fit, own in zip(self.fits.values(), states, strict=True):
            fit.load_state(own)
