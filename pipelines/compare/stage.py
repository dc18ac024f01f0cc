"""Compare this project's routers with other methods, on equal noise.

All are timed against full sampling.

Trained routers and measured results are stored, so an interrupted comparison continues with the next
variant. A variant that fails is reported as not measured, and the others still count.
"""

import dataclasses
import tempfile
import time
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
from .arms import (
    About,
    Method,
    about_entry,
    library_method,
    made_method,
    made_methods,
    not_measured,
    published_arms,
    untrained_arms,
)
from .measuring import Bench, reason_of
from .methods import Entry, full_variant, learned_methods, learned_variant
from .names import OURS, shown_name
from .plot import comparison_picture
from .ranking import leaders, ranking_summary
from .results import Results, compared
from .third_party_caches import library_variants

_SAY_EVERY_S = 20.0


@plainly()
def compare_methods(config: WorkflowConfig, storage: RunStorage) -> tuple[dict[str, Any], Figure]:
    """Measure all methods; return the comparison, JSON-ready, and its plot.

    Raises:
        Exception: full sampling itself fails, so there is nothing to compare with.
    """
    config, folder = dataclasses.replace(config, storage_path=storage.root), work_folder("compare", storage)
    spec, macs = ray.get(ray.remote(_model_facts).remote(config))
    methods, missing = _train_learned(config, storage, folder, macs)
    arms = untrained_arms(config, macs)
    if config.compare.published:
        arms += published_arms(config, storage, folder, macs)
    made, not_made = made_methods(arms, macs)
    methods, missing = methods + made, missing + not_made
    references: list[Variant] = [full_variant(config.sampler)]
    if config.compare.libraries and spec.prompts is None and config.sampler.name == "ddim":
        uncached, *cached = library_variants(config.model, config.sampler)
        references.append(uncached)
        methods += [library_method(variant) for variant in cached]
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
    methods: list[Method], bench: Bench, results: Results
) -> tuple[list[About], float, list[About]]:
    """Return the points, the times' largest spread and the variants not measured."""
    points, missing, spreads, last_said = [], [], [0.0], time.monotonic()
    for place, one in enumerate(methods, start=1):
        try:
            if (result := results.get(one.variant.name)) is None:
                quality, spread = bench.measure(one.variant)
                result = {"point": one.about | quality, SECONDS_SPREAD: spread}
                results.put(one.variant.name, result)
        except Exception as error:  # many libraries raise their own; the other variants count
            missing.append(not_measured(one.about, reason_of(error)))
            continue
        points.append(point := result["point"])
        spreads.append(result[SECONDS_SPREAD])
        if time.monotonic() - last_said > _SAY_EVERY_S:
            last_said = time.monotonic()
            shown = f"{point[SPEEDUP]:.2f}x, {point[PSNR_TO_FULL]:.1f} dB"
            say(f"[compare] {place} of {len(methods)} variants, {shown_name(point)}: {shown}")
    return points, max(spreads), missing


def _train_learned(
    config: WorkflowConfig, storage: RunStorage, folder: str, macs: Macs
) -> tuple[list[Method], list[About]]:
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
        about, doing = about_entry(entry), "its training failed"
        try:
            if entry in running:
                ray.get(running[entry])
            doing = "its router cannot be read"
            artifact = load_router(storage, places[entry])
            if entry.method == OURS:
                about["label"] = artifact.method
            methods.append(made_method(about, learned_variant(entry, artifact), macs))
        except Exception as error:  # a worker failed or a file is damaged; the other variants count
            missing.append(not_measured(about, f"{doing}: {reason_of(error)}"))
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
