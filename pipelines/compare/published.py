"""List the published methods compared at a speed, beside those of `methods`.

Forecasts that follow from the steps alone share the even plan of the speed, so that they differ in nothing
else; TaylorSeer also has its own schedules. Predictors and schedules that are fitted or searched see some
images first, on a worker.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.plan_builders import even_plan
from harmonica.data.batch import Batch
from harmonica.data.samples import make_samples
from harmonica.models.base import Macs
from harmonica.models.loading import load_model
from harmonica.samplers import Sampler, SamplerConfig, make_sampler

from ..config.workflow import WorkflowConfig
from ..data.stream import sample_spec
from ..evaluation.latency import device_of
from ..evaluation.variants import Variant
from ..run_state.storage import RunStorage
from ..runtime.ray_runtime import quiet_libraries
from .baselines.budcache import budcache
from .baselines.dbcache import dbcache
from .baselines.foca import foca
from .baselines.hicache import hicache
from .baselines.l2p import l2p
from .baselines.magcache import magcache
from .baselines.schedules import (
    INTERVALS,
    interval_plan,
    output_changes,
    threshold_plan,
)
from .baselines.speca import speca
from .baselines.spectrum import spectrum
from .baselines.taylorseer import taylorseer
from .methods import Entry

Forecaster = Callable[[Plan], Plan]
FORECASTS: dict[str, Forecaster] = {
    "TaylorSeer, order 2": partial(taylorseer, order=2),
    "TaylorSeer, order 3": partial(taylorseer, order=3),
    "TaylorSeer, order 4": partial(taylorseer, order=4),
    "HiCache, order 2": partial(hicache, order=2),
    "FoCa": foca,
    "Spectrum": spectrum,
}
"""Forecasts of the values that the even plan keeps."""
_ORDERS, _NEAR = (1, 2), 1.15
"""Orders of TaylorSeer on its own schedules, and how far their speed may be from one that is asked for."""
Calibrate = Callable[[Sampler, Sequence[Batch], float], Plan]


def _l2p(sampler: Sampler, batches: Sequence[Batch], speedup: float) -> Plan:
    return l2p(even_plan(sampler.num_steps, sampler.model.macs(), speedup), sampler, batches)


def _teacache(sampler: Sampler, batches: Sequence[Batch], speedup: float) -> Plan:
    return threshold_plan(output_changes(sampler, batches), sampler.model.macs(), speedup)


def _budcache(sampler: Sampler, batches: Sequence[Batch], speedup: float) -> Plan:
    return budcache(sampler, batches[:1], speedup, "forecast")


CALIBRATED: dict[str, tuple[Calibrate, Reuse]] = {
    "L2P": (_l2p, "forecast"),
    "BudCache + linear forecast": (_budcache, "forecast"),
    "SpeCa": (speca, "forecast"),
    "DBCache": (dbcache, "hold"),
    "DBCache + linear forecast": (dbcache, "forecast"),
    "TeaCache": (_teacache, "hold"),
    "MagCache": (magcache, "hold"),
}
"""How a method's plan is made from some images, and what it makes of the values it kept."""
_BATCHES, _BATCH = 4, 8
"""Images that a method is calibrated on: 32 in all."""


def forecast_variant(sampler: SamplerConfig, macs: Macs, entry: Entry) -> Variant:
    """Return the variant of one of `FORECASTS` at a speed."""
    plan = even_plan(sampler.num_inference_steps, macs, entry.target)
    return Variant(entry.name, sampler, FORECASTS[entry.method](plan), "forecast")


def own_intervals(num_steps: int, macs: Macs, targets: Sequence[float]) -> list[tuple[int, int]]:
    """Return interval and order of TaylorSeer's own schedules near the speeds.

    For each speed it is the nearest interval, in the orders 1 and 2, if its speed is at most 15% away.
    """
    branches, found = len(macs.branches), set[int]()
    speeds = {n: interval_plan(num_steps, branches, n).ideal_speedup(macs) for n in INTERVALS}
    for target in targets:
        apart, nearest = min((max(speed / target, target / speed), n) for n, speed in speeds.items())
        found |= {nearest} if apart <= _NEAR else set()
    return [(interval, order) for interval in sorted(found) for order in _ORDERS]


def interval_name(interval: int, order: int) -> str:
    """Return the name of TaylorSeer of an order on its own schedule."""
    return f"TaylorSeer, interval {interval}, order {order}"


def interval_variant(sampler: SamplerConfig, macs: Macs, interval: int, order: int) -> Variant:
    """Return the variant of TaylorSeer of an order on its own schedule."""
    plan = interval_plan(sampler.num_inference_steps, len(macs.branches), interval)
    return Variant(interval_name(interval, order), sampler, taylorseer(plan, order), "forecast")


def calibrated_variant(config: WorkflowConfig, entry: Entry, storage: RunStorage, folder: str) -> Variant:
    """Return the variant of a plan that `calibrate` stored in the run's folder."""
    stored = storage.read_json(f"{folder}/{entry.name}.json")
    compute = tuple(tuple(cell == "1" for cell in row) for row in stored["compute"])
    forecast = stored["forecast"]
    weights = None if forecast is None else tuple(tuple(map(tuple, row)) for row in forecast)
    _, reuse = CALIBRATED[entry.method]
    return Variant(entry.name, config.sampler, Plan(compute, weights), reuse)


def calibrate(config: WorkflowConfig, entry: Entry, folder: str) -> None:
    """Make a method's plan and store it in the run's folder; runs on a worker."""
    quiet_libraries()
    device = device_of(config.evaluate.use_gpu)
    model = load_model(config.model, device).model
    # Other images than those that are compared, and others for each method.
    seed = config.seed + zlib.crc32(entry.name.encode())
    spec = sample_spec(config, model, seed)
    batches = [
        spec.to_batch(make_samples(np.arange(first, first + _BATCH), spec), device)
        for first in range(0, _BATCHES * _BATCH, _BATCH)
    ]
    make, _ = CALIBRATED[entry.method]
    plan = make(make_sampler(model, config.sampler), batches, entry.target)
    stored = {"compute": plan.to_strings(), "forecast": plan.forecast}
    storage = RunStorage(config.storage_path, config.run_id, patient=True)
    storage.write_json(f"{folder}/{entry.name}.json", stored)
