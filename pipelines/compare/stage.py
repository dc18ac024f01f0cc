"""This project's routers beside other methods: each trained where it learns, timed in turn with full
sampling, judged on the same noise.

A router that has been trained and an arm that has been measured are kept, so a comparison that was
interrupted goes on with the next; an arm that fails is reported as not measured, and the others count.
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
from harmonica.data.batch import RowSpec, Share
from harmonica.models.base import Macs
from harmonica.models.loading import load_model
from pipelines.compare.measuring import Bench, reason_of
from pipelines.compare.methods import Entry, full_arm, learned_arm, learners, unlearned
from pipelines.compare.names import OURS, label_of, shown_name
from pipelines.compare.plot import comparison_picture
from pipelines.compare.ranking import ahead, missing_name, verdict
from pipelines.compare.results import Results, compared
from pipelines.compare.third_party_caches import LibraryArm, library_arms
from pipelines.config.workflow import TrainConfig, WorkflowConfig
from pipelines.data.stream import row_spec
from pipelines.evaluation.latency import FULL, SEED_OFFSET, Arm, device_of
from pipelines.run_state.resume import work_folder
from pipelines.run_state.routers import load_router
from pipelines.run_state.storage import RunStorage
from pipelines.runtime.ray_runtime import plainly, quiet_libraries
from pipelines.training.stage import start_run

_SAY_EVERY_S = 20.0
About = dict[str, Any]
"""What is known of an arm before it is measured, as a point of `comparison.json` has it."""


@dataclass(frozen=True)
class _Contender:
    """An arm, and what its point says of it beside the measurements."""

    about: About
    arm: Arm


@plainly()
def compare(config: WorkflowConfig, storage: RunStorage) -> tuple[dict[str, Any], Figure]:
    """All points, JSON-ready, what was not measured and why, and the picture: quality against measured speed.

    Raises:
        Exception: full sampling itself fails, so that nothing can be held against it.
    """
    config, folder = dataclasses.replace(config, storage_path=storage.root), work_folder("compare", storage)
    spec, macs = ray.get(ray.remote(_model_facts).remote(config))
    contenders, missing = _learned(config, storage, folder, macs)
    contenders += _unlearned(config, macs)
    references: list[Arm] = [full_arm(config.sampler)]
    if config.compare.libraries and spec.prompts is None and config.sampler.name == "ddim":
        uncached, *cached = library_arms(config.model, config.sampler)
        references.append(uncached)
        contenders += [_of_library(arm) for arm in cached]
    settings = dataclasses.replace(config.evaluate, samples=config.compare.samples)
    results = Results(storage, folder, config.compare.samples)
    with Bench(dataclasses.replace(config, evaluate=settings), spec, references) as bench:
        if (full := results.get(FULL)) is None:
            results.put(FULL, full := bench.quality_of(FULL))
        points, spread, failed = _measured(contenders, bench, results)
    speeds, missing = ahead(points, config.compare.targets), missing + failed
    return {
        "num_inference_steps": config.sampler.num_inference_steps,
        "sampler": config.sampler.name,
        "samples": config.compare.samples,
        "seconds_spread": spread,
        "full": full,
        "points": points,
        "not_measured": missing,
        "speeds": speeds,
        "verdict": verdict(speeds, points, missing),
        "compared": compared(config.compare),
    }, comparison_picture(points, missing)


def _model_facts(config: WorkflowConfig) -> tuple[RowSpec, Macs]:
    model = load_model(config.model).model
    return row_spec(config, model, config.seed + SEED_OFFSET), model.macs()


def _measured(
    contenders: list[_Contender], bench: Bench, results: Results
) -> tuple[list[About], float, list[About]]:
    """The points, the largest spread of times behind them, and what was not measured."""
    points, missing, spreads, last_said = [], [], [0.0], time.monotonic()
    for place, one in enumerate(contenders, start=1):
        if (result := results.get(one.arm.name)) is None:
            try:
                quality, spread = bench.measure(one.arm)
            except Exception as error:  # of many libraries; the other arms count
                missing.append(one.about | {"reason": reason_of(error)})
                say(f"[compare] {missing_name(missing[-1])} is not measured: {missing[-1]['reason']}")
                continue
            result = {"point": one.about | quality, "seconds_spread": spread}
            results.put(one.arm.name, result)
        points.append(point := result["point"])
        spreads.append(result["seconds_spread"])
        if time.monotonic() - last_said > _SAY_EVERY_S:
            last_said = time.monotonic()
            near = f"{point['speedup']:.2f}x, {point['psnr_to_full']:.1f} dB"
            say(f"[compare] {place} of {len(contenders)} arms, {shown_name(point)}: {near}")
    return points, max(spreads), missing


def _learned(
    config: WorkflowConfig, storage: RunStorage, folder: str, macs: Macs
) -> tuple[list[_Contender], list[About]]:
    """A router of each learning method, speed and seed, as many at once as there are cores or GPUs; and those
    that could not be trained.

    Args:
        folder: of the run, where routers are kept.
    """
    wanted: dict[Entry, TrainConfig] = {}
    for seed in range(config.compare.seeds):
        for target in config.compare.targets:
            settings = learners(config.train, target, rivals=config.compare.learners)
            wanted |= {Entry(method, target, seed): train for method, train in settings.items()}
    task = ray.remote(num_cpus=1, num_gpus=int(config.evaluate.use_gpu), max_retries=3)(_train_one)
    places = {entry: f"{folder}/{entry.name}" for entry in wanted}
    running = {
        entry: task.remote(config, entry, train, places[entry])
        for entry, train in wanted.items()
        if not storage.exists(f"{places[entry]}/config.json")
    }
    contenders, missing = [], []
    for entry in wanted:
        about, doing = _about(entry), "its training failed"
        try:
            if entry in running:
                ray.get(running[entry])
            doing = "its router cannot be read"
            artifact = load_router(storage, places[entry])
        except Exception as error:  # of a worker, of a damaged file; the other arms count
            missing.append(about | {"reason": f"{doing}: {reason_of(error)}"})
            say(f"[compare] {missing_name(missing[-1])} is not measured: {missing[-1]['reason']}")
            continue
        if entry.method == OURS:
            about["label"] = artifact.method
        contenders.append(_contender(about, learned_arm(entry, artifact), macs))
    return sorted(contenders, key=lambda one: one.about["target_speedup"]), missing


def _train_one(config: WorkflowConfig, entry: Entry, train: TrainConfig, place: str) -> None:
    quiet_libraries()
    config = dataclasses.replace(config, train=train, seed=config.seed + 1000 * entry.seed)
    run, spec = start_run(config, device_of(config.evaluate.use_gpu))
    for _ in trained(run, spec, Share(train.batch_size)):
        pass
    artifact = run.artifact(**config.to_dict()["train"])
    storage = RunStorage(config.storage_path, config.run_id, patient=True)
    with tempfile.TemporaryDirectory() as folder:
        storage.upload_folder(artifact.save(folder), place)


def _unlearned(config: WorkflowConfig, macs: Macs) -> list[_Contender]:
    return [
        _contender(_about(entry), arm, macs)
        for target in config.compare.targets
        for entry, arm in unlearned(config.sampler, macs, target, config.compare.seeds)
    ]


def _about(entry: Entry) -> About:
    label = {"label": label_of(entry.method)}
    return {"method": entry.method, **label, "target_speedup": entry.target, "seed": entry.seed}


def _contender(about: About, arm: Arm, macs: Macs) -> _Contender:
    known: About = {"num_inference_steps": arm.num_inference_steps, **about}
    if arm.plan is not None:
        known["cur"], known["ideal_speedup"] = arm.plan.cur, arm.plan.ideal_speedup(macs)
    return _Contender(known, arm)


def _of_library(arm: LibraryArm) -> _Contender:
    steps: About = {"num_inference_steps": arm.num_inference_steps}
    return _Contender(steps | {"method": arm.library, "label": arm.library, "setting": arm.setting}, arm)
