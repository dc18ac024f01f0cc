"""What is compared at a point of the grid, and what its points share."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.plan_builders import even_plan, with_fixed_correction
from harmonica.core.segments import with_segments
from harmonica.data.batch import Batch
from harmonica.data.conditions import make_conditions
from harmonica.models.base import BranchedTransformer
from harmonica.models.loading import LoadedModel
from harmonica.samplers import Sampler, make_sampler
from harmonica.training.plans.fitted_weights import LEAST_STEPS
from harmonica.training.plans.forecast_fit import ForecastFit
from harmonica.training.presets import Recipe
from harmonica.training.router_phase import RouterPhase
from harmonica.training.sampler_backend import SamplerBackend
from harmonica.training.trainer import RouterTrainer
from pipelines.compare.published import CALIBRATED, FORECASTS, interval_variant, own_intervals
from tests.benchmarks import cross_attention, ideas

LEARNED, EVEN = "learned steps, fitted forecast", "even steps, fitted forecast"
UNTRAINED = "even steps, linear forecast, fixed correction"
_CALIBRATION_BATCHES, _CALIBRATION_BATCH = 4, 8
FIRST_JUDGED = 100_000
"""The number of the first judged row; the noise of these rows is seen by no training."""
Rows = Callable[[Sampler, int, int, int], Batch]
"""Takes a sampler, a seed, the number of the first row and how many."""


def rows_of(recipe: Recipe, loaded: LoadedModel) -> Rows:
    """Labels of the class-conditional model, captions of the one that takes text."""
    if not recipe.model.text_tokens:
        return ideas.rows
    conditions = make_conditions(loaded, "cpu", dtype="float32")

    def captions(sampler: Sampler, seed: int, first: int, count: int) -> Batch:
        return Batch(*cross_attention.rows(sampler.model, conditions, seed, first, count))

    return captions


def first_judged(recipe: Recipe) -> int:
    """Return the number of the first judged row: neither its noise nor its caption is seen by a training."""
    return cross_attention.FIRST_JUDGED if recipe.model.text_tokens else FIRST_JUDGED


class Drawn(NamedTuple):
    """How an arm draws its images."""

    sampler: Sampler
    plan: Plan | None = None
    reuse: Reuse = "forecast"


@dataclass(frozen=True)
class Arm:
    """One method at a point."""

    name: str
    make: Callable[[], Drawn]
    """Learns or builds it, when it is asked for."""
    depends_on_seed: bool = True
    fit: str | None = None
    """How its weights were fitted, where they were."""


class RememberedImages(SamplerBackend):
    """Draws the images of training's samples once for all speeds and plans."""

    def __init__(self, sampler: Sampler) -> None:
        super().__init__(sampler)
        self._known: dict[Any, Tensor] = {}

    def images(self, batch: Batch, plan: Plan | None = None, reuse: Reuse = "hold") -> Tensor:
        assert batch.keys is not None, "training's samples have keys"
        key = (tuple(batch.keys.seeds), tuple(batch.keys.indices), plan, reuse)
        if key not in self._known:
            self._known[key] = super().images(batch, plan, reuse).clone()
        return self._known[key]


class Series:
    """One number of steps and one seed of a preset; its speeds share the measured start and full images."""

    def __init__(
        self, recipe: Recipe, model: BranchedTransformer, rows: Rows, num_steps: int, seed: int
    ) -> None:
        # A single update, which keeps the samples of the phases after it where they were, and is left out.
        self.recipe, self.train = recipe, replace(recipe.train, trajectories=1)
        self.rows, self.seed, self.model = rows, seed, model
        self.sampler = self._sampler_of(num_steps)
        self.backend = RememberedImages(self.sampler)
        self._measured: RouterTrainer | None = None
        self._fitted: dict[tuple[tuple[bool, ...], ...], Plan] = {}

    def _sampler_of(self, num_steps: int) -> Sampler:
        return make_sampler(self.model, replace(self.recipe.sampler, num_inference_steps=num_steps))

    def fewer(self, speedup: float) -> Sampler:
        """The full sampler with as many steps as the speed leaves."""
        return self._sampler_of(round(self.sampler.num_steps / speedup))

    def even(self, speedup: float) -> Plan:
        """Evenly spread steps of a speed."""
        return even_plan(self.sampler.num_steps, self.model.macs(), speedup)

    def batch(self, trajectory: int) -> Batch:
        """Samples that are trained on."""
        size = self.train.batch_size
        return self.rows(self.sampler, self.seed, trajectory * size, size)

    def learned(self, speedup: float) -> Drawn:
        """Ours: the measured start, the choice, then the fit."""
        config = self.train.for_target(target_speedup=speedup)
        run = RouterTrainer(self.sampler, config, seed=self.seed, backend=self.backend)
        if self._measured is not None:
            run.start_as(self._measured)
        while run.trajectory < config.all_trajectories:
            if isinstance(run.phase, RouterPhase):
                run.phase.done = run.phase.trajectories
                run.phase.begin()  # the choice
            run.train_one(self.batch(run.trajectory), ideas.on_one_worker)
        self._measured = self._measured or run
        plan = run.artifact().plan
        self._fitted[plan.compute] = plan
        return Drawn(self.sampler, plan)

    def even_fitted(self, speedup: float) -> Drawn:
        """Even steps after the same fit, of the same images; where they are what was learned, that plan."""
        even, forecast = self.even(speedup), self.train.forecast
        if even.compute not in self._fitted:
            plan = with_segments(even, self.model) if forecast.segments else even
            fit = ForecastFit(plan, forecast)
            first = self.train.for_target(target_speedup=speedup).all_trajectories - forecast.trajectories
            for trajectory in range(first, first + forecast.trajectories):
                parts = self.batch(trajectory).split(forecast.rows_at_once)
                fit.observe(self.backend, parts, ideas.on_one_worker)
            self._fitted[even.compute] = fit.planned()
        return Drawn(self.sampler, self._fitted[even.compute])

    def arms(self, speedup: float, *, has_published: bool, has_calibrated: bool) -> Iterator[Arm]:
        """What is compared at a speed."""
        forecast = self.train.forecast
        begins = "from the fixed correction"
        if self.sampler.num_steps < LEAST_STEPS:
            begins = f"{forecast.corrections} corrections"
        fit = f"{forecast.num_rounds} rounds, {begins}, probes along the change"
        if forecast.segments:
            fit += ", segments"
        yield Arm(
            LEARNED,
            partial(self.learned, speedup),
            fit=f"{fit}, {forecast.finalists} finalists over {forecast.compared}",
        )
        yield Arm(EVEN, partial(self.even_fitted, speedup), fit=fit)
        even = self.even(speedup)
        fixed = {
            UNTRAINED: Drawn(self.sampler, with_fixed_correction(even)),
            "linear forecast": Drawn(self.sampler, even),
            "held (FORA)": Drawn(self.sampler, even, "hold"),
            "fewer steps": Drawn(self.fewer(speedup)),
        }
        if has_published:
            fixed |= {name: Drawn(self.sampler, of(even)) for name, of in FORECASTS.items()}
            macs = self.model.macs()
            for interval, order in own_intervals(self.sampler.num_steps, macs, [speedup]):
                variant = interval_variant(self.sampler.config, macs, interval, order)
                fixed[variant.name] = Drawn(self.sampler, variant.plan)
        for name, drawn in fixed.items():
            yield Arm(name, partial(Drawn, *drawn), depends_on_seed=False)
        for name in CALIBRATED if has_calibrated else ():
            yield Arm(name, partial(self._calibrated, name, speedup))

    def _calibrated(self, name: str, speedup: float) -> Drawn:
        make, reuse = CALIBRATED[name]
        size = _CALIBRATION_BATCH
        batches = [self.rows(self.sampler, self.seed, k * size, size) for k in range(_CALIBRATION_BATCHES)]
        return Drawn(self.sampler, make(self.sampler, batches, speedup), reuse)
