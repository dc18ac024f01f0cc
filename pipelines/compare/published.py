"""List the published methods compared at a speed, beside those of `methods`.

Forecasts that follow from the steps alone share the even plan of the speed, so that they differ in nothing
else. Predictors and schedules that are fitted or searched see some images first, on a worker.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from harmonica.core.plan import Plan
from harmonica.data.batch import Batch
from harmonica.data.samples import make_samples
from harmonica.models.base import Macs
from harmonica.models.loading import load_model
from harmonica.samplers import Sampler, SamplerConfig, make_sampler
from harmonica.training.plans.builders import even_plan

from ..config.workflow import WorkflowConfig
from ..data.stream import sample_spec
from ..evaluation.latency import device_of
from ..evaluation.variants import Variant
from ..run_state.storage import RunStorage
from ..runtime.ray_runtime import quiet_libraries
from .baselines.budcache import budcache
from .baselines.hicache import hicache
from .baselines.l2p import l2p
from .baselines.schedules import magnitude_changes, output_changes, threshold_plan
from .baselines.spectrum import spectrum
from .baselines.taylorseer import taylorseer
from .methods import Entry

_FORECASTS: dict[str, Callable[[Plan], Plan]] = {
    "TaylorSeer, order 2": partial(taylorseer, order=2),
    "TaylorSeer, order 3": partial(taylorseer, order=3),
    "TaylorSeer, order 4": partial(taylorseer, order=4),
    "HiCache, order 2": partial(hicache, order=2),
    "Spectrum": spectrum,
}
"""Forecasts of the values that the even plan keeps."""
Calibrate = Callable[[Sampler, Sequence[Batch], float], Plan]


def _l2p(sampler: Sampler, batches: Sequence[Batch], speedup: float) -> Plan:
    return l2p(even_plan(sampler.num_steps, sampler.model.macs(), speedup), sampler, batches)


def _teacache(sampler: Sampler, batches: Sequence[Batch], speedup: float) -> Plan:
    return threshold_plan(output_changes(sampler, batches), sampler.model.macs(), speedup)


def _magcache(sampler: Sampler, batches: Sequence[Batch], speedup: float) -> Plan:
    return threshold_plan(magnitude_changes(sampler, batches), sampler.model.macs(), speedup)


def _budcache(sampler: Sampler, batches: Sequence[Batch], speedup: float) -> Plan:
    return budcache(sampler, batches[:1], speedup, "forecast")


_CALIBRATED: dict[str, tuple[Calibrate, bool]] = {
    "L2P": (_l2p, True),
    "BudCache + linear forecast": (_budcache, True),
    "TeaCache": (_teacache, False),
    "MagCache": (_magcache, False),
}
"""How a method's plan is made from some images, and whether it forecasts or holds values."""
_BATCHES, _BATCH = 4, 8
"""Images that a method is calibrated on: 32 in all."""


def forecast_methods(sampler: SamplerConfig, macs: Macs, target: float) -> list[tuple[Entry, Variant]]:
    """Return the published forecasts at a speed."""
    plan = even_plan(sampler.num_inference_steps, macs, target)
    made = [(Entry(name, target), forecast(plan)) for name, forecast in _FORECASTS.items()]
    return [(entry, Variant(entry.name, sampler, plan, "forecast")) for entry, plan in made]


def calibrated_entries(target: float) -> list[Entry]:
    """Return the entries of the methods that see images first, at a speed."""
    return [Entry(name, target) for name in _CALIBRATED]


def calibrated_variant(config: WorkflowConfig, entry: Entry, storage: RunStorage, folder: str) -> Variant:
    """Return the variant of a plan that `calibrate` stored in the run's folder."""
    stored = storage.read_json(f"{folder}/{entry.name}.json")
    compute = tuple(tuple(cell == "1" for cell in row) for row in stored["compute"])
    forecast = stored["forecast"]
    weights = None if forecast is None else tuple(tuple(map(tuple, row)) for row in forecast)
    _, forecasts = _CALIBRATED[entry.method]
    return Variant(entry.name, config.sampler, Plan(compute, weights), "forecast" if forecasts else "hold")


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
    make, _ = _CALIBRATED[entry.method]
    plan = make(make_sampler(model, config.sampler), batches, entry.target)
    stored = {"compute": plan.to_strings(), "forecast": plan.forecast}
    storage = RunStorage(config.storage_path, config.run_id, patient=True)
    storage.write_json(f"{folder}/{entry.name}.json", stored)
