"""Compare this project's routers with other methods, on equal noise.

All are timed against full sampling.

Trained routers and measured results are stored, so an interrupted comparison continues with the next
variant. A variant that fails is reported as not measured, and the others still count.
"""

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import ray
from matplotlib.figure import Figure

from harmonica.cli.common import say
from harmonica.cli.train import trained
from harmonica.data.samples import SampleSpec, Shard
from harmonica.evaluation.evaluation_report import FULL
from harmonica.evaluation.metric_table import PSNR_TO_FULL, SECONDS_SPREAD, SPEEDUP
from harmonica.models.base import Macs
from harmonica.models.loading import load_model

from ..config.workflow import TrainConfig, WorkflowConfig
from ..data.stream import sample_spec
from ..evaluation.latency import SEED_OFFSET, device_of
from ..evaluation.variants import Variant
from ..run_state.resume import work_folder
from ..run_state.routers import load_router
from ..run_state.storage import RunStorage
from ..runtime.ray_runtime import plainly, quiet_libraries
from ..training.jobs import start_run
from .measuring import Bench, reason_of
from .methods import Entry, full_variant, learned_methods, learned_variant, untrained_methods
from .names import OURS, label_of, shown_name
from .plot import comparison_picture
from .published import calibrate, calibrated_entries, calibrated_variant, forecast_methods
from .ranking import leaders, missing_name, ranking_summary
from .results import Results, compared
from .third_party_caches import LibraryVariant, library_variants

_SAY_EVERY_S = 20.0
About = dict[str, Any]
"""Fields of a variant's point in `comparison.json` that are known before it is measured."""


@dataclass(frozen=True)
class _Method:
    """A variant, and those fields of its point that are not measured."""

    about: About
    variant: Variant


@plainly()
def compare_methods(config: WorkflowConfig, storage: RunStorage) -> tuple[dict[str, Any], Figure]:
    """Measure all methods; return the comparison, JSON-ready, and its plot.

    Raises:
        Exception: full sampling itself fails, so there is nothing to compare with.
    """
    config, folder = dataclasses.replace(config, storage_path=storage.root), work_folder("compare", storage)
    spec, macs = ray.get(ray.remote(_model_facts).remote(config))
    methods, missing = _train_learned(config, storage, folder, macs)
    methods += _untrained(config, macs)
    if config.compare.published:
        calibrated, not_made = _calibrated(config, storage, folder, macs)
        methods, missing = methods + calibrated, missing + not_made
    references: list[Variant] = [full_variant(config.sampler)]
    if config.compare.libraries and spec.prompts is None and config.sampler.name == "ddim":
        uncached, *cached = library_variants(config.model, config.sampler)
        references.append(uncached)
        methods += [_of_library(variant) for variant in cached]
    settings = dataclasses.replace(config.evaluate, samples=config.compare.samples)
    results = Results(storage, folder, config.compare.samples)
    with Bench(dataclasses.replace(config, evaluate=settings), spec, references) as bench:
        if (full := results.get(FULL)) is None:
            results.put(FULL, full := bench.quality_of(FULL))
        points, spread, failed = _measured(methods, bench, results)
    speeds, missing = leaders(points, config.compare.targets), missing + failed
    return {
        "num_inference_steps": config.sampler.num_inference_steps,
        "sampler": config.sampler.name,
        "samples": config.compare.samples,
        SECONDS_SPREAD: spread,
        "full": full,
        "points": points,
        "not_measured": missing,
        "speeds": speeds,
        "verdict": ranking_summary(speeds, points, missing),
        "compared": compared(config.compare),
    }, comparison_picture(points, missing)


def _model_facts(config: WorkflowConfig) -> tuple[SampleSpec, Macs]:
    model = load_model(config.model).model
    return sample_spec(config, model, config.seed + SEED_OFFSET), model.macs()


def _measured(
    methods: list[_Method], bench: Bench, results: Results
) -> tuple[list[About], float, list[About]]:
    """Return the points, the times' largest spread and the variants not measured."""
    points, missing, spreads, last_said = [], [], [0.0], time.monotonic()
    for place, one in enumerate(methods, start=1):
        if (result := results.get(one.variant.name)) is None:
            try:
                quality, spread = bench.measure(one.variant)
            except Exception as error:  # many libraries raise their own; the other variants count
                missing.append(one.about | {"reason": reason_of(error)})
                say(f"[compare] {missing_name(missing[-1])} is not measured: {missing[-1]['reason']}")
                continue
            result = {"point": one.about | quality, SECONDS_SPREAD: spread}
            results.put(one.variant.name, result)
        points.append(point := result["point"])
        spreads.append(result[SECONDS_SPREAD])
        if time.monotonic() - last_said > _SAY_EVERY_S:
            last_said = time.monotonic()
            shown = f"{point[SPEEDUP]:.2f}x, {point[PSNR_TO_FULL]:.1f} dB"
            say(f"[compare] {place} of {len(methods)} variants, {shown_name(point)}: {shown}")
    return points, max(spreads), missing


def _train_learned(
    config: WorkflowConfig, storage: RunStorage, folder: str, macs: Macs
) -> tuple[list[_Method], list[About]]:
    """Train a router for each learned method, speed and seed, in parallel.

    Args:
        folder: the run's folder, in which routers are stored.

    Returns:
        The methods that have a router, and the points of those that could not be trained.
    """
    wanted: dict[Entry, TrainConfig] = {}
    for seed in range(config.compare.seeds):
        for target in config.compare.targets:
            settings = learned_methods(config.train, target, with_baselines=config.compare.learners)
            wanted |= {Entry(method, target, seed): train for method, train in settings.items()}
    task = ray.remote(num_cpus=1, num_gpus=int(config.evaluate.use_gpu), max_retries=3)(_train_one)
    places = {entry: f"{folder}/{entry.name}" for entry in wanted}
    running = {
        entry: task.remote(config, entry, train, places[entry])
        for entry, train in wanted.items()
        if not storage.exists(f"{places[entry]}/config.json")
    }
    methods, missing = [], []
    for entry in wanted:
        about, doing = _about(entry), "its training failed"
        try:
            if entry in running:
                ray.get(running[entry])
            doing = "its router cannot be read"
            artifact = load_router(storage, places[entry])
        except Exception as error:  # a worker failed or a file is damaged; the other variants count
            missing.append(about | {"reason": f"{doing}: {reason_of(error)}"})
            say(f"[compare] {missing_name(missing[-1])} is not measured: {missing[-1]['reason']}")
            continue
        if entry.method == OURS:
            about["label"] = artifact.method
        methods.append(_method(about, learned_variant(entry, artifact), macs))
    return sorted(methods, key=lambda one: one.about["target_speedup"]), missing


def _train_one(config: WorkflowConfig, entry: Entry, train: TrainConfig, place: str) -> None:
    quiet_libraries()
    config = dataclasses.replace(config, train=train, seed=config.seed + 1000 * entry.seed)
    run, spec = start_run(config, device_of(config.evaluate.use_gpu))
    for _ in trained(run, spec, Shard(train.batch_size)):
        pass
    artifact = run.artifact(**config.to_dict()["train"])
    storage = RunStorage(config.storage_path, config.run_id, patient=True)
    with tempfile.TemporaryDirectory() as folder:
        storage.upload_folder(artifact.save(folder), place)


def _untrained(config: WorkflowConfig, macs: Macs) -> list[_Method]:
    made: list[tuple[Entry, Variant]] = []
    for target in config.compare.targets:
        made += untrained_methods(config.sampler, macs, target, config.compare.seeds)
        if config.compare.published:
            made += forecast_methods(config.sampler, macs, target)
    return [_method(_about(entry), variant, macs) for entry, variant in made]


def _calibrated(
    config: WorkflowConfig, storage: RunStorage, folder: str, macs: Macs
) -> tuple[list[_Method], list[About]]:
    """Make the plans of the methods that see images first.

    Returns:
        The methods, and the points of those whose plan could not be made.
    """
    entries = [entry for target in config.compare.targets for entry in calibrated_entries(target)]
    task = ray.remote(num_cpus=1, num_gpus=int(config.evaluate.use_gpu), max_retries=3)(calibrate)
    running = {
        entry: task.remote(config, entry, folder)
        for entry in entries
        if not storage.exists(f"{folder}/{entry.name}.json")
    }
    methods, missing = [], []
    for entry in entries:
        about = _about(entry)
        try:
            if entry in running:
                ray.get(running[entry])
            methods.append(_method(about, calibrated_variant(config, entry, storage, folder), macs))
        except Exception as error:  # of a worker, of a damaged file; the other variants count
            missing.append(about | {"reason": f"its plan could not be made: {reason_of(error)}"})
            say(f"[compare] {missing_name(missing[-1])} is not measured: {missing[-1]['reason']}")
    return methods, missing


def _about(entry: Entry) -> About:
    label = {"label": label_of(entry.method)}
    return {"method": entry.method, **label, "target_speedup": entry.target, "seed": entry.seed}


def _method(about: About, variant: Variant, macs: Macs) -> _Method:
    known: About = {"num_inference_steps": variant.num_inference_steps, **about}
    if variant.plan is not None:
        known["cur"], known["ideal_speedup"] = variant.plan.cur, variant.plan.ideal_speedup(macs)
    return _Method(known, variant)


def _of_library(variant: LibraryVariant) -> _Method:
    steps: About = {"num_inference_steps": variant.num_inference_steps}
    return _Method(
        steps | {"method": variant.library, "label": variant.library, "setting": variant.setting}, variant
    )
