"""HarmoniCa beside its rivals: each trained where it learns, timed arm beside arm, judged on the same noise.

A router that has been trained is kept, so a comparison that was interrupted goes on with the next.
"""

import dataclasses
import math
import tempfile
from typing import Any

import numpy as np
import ray
from matplotlib.figure import Figure

from harmonica.artifact import RouterArtifact
from harmonica.models.base import Macs
from harmonica.models.loading import load_model
from harmonica.rows import Batch, RowSpec, Share, make_rows
from harmonica.train import trained
from pipelines.comparing.comparison_picture import comparison_picture
from pipelines.comparing.contenders import OURS, Entry, full_arm, learned_arm, learners, unlearned
from pipelines.comparing.rivals import LibraryArm, library_arms
from pipelines.config import TrainConfig, WorkflowConfig
from pipelines.judging import judge
from pipelines.resume import work_folder
from pipelines.runtime import quiet_libraries
from pipelines.storage import RunStorage
from pipelines.stream import row_spec
from pipelines.timing import FULL, SEED_OFFSET, Arm, device_of, median_times
from pipelines.train import start_run

_NEAR = 0.97
"""Of a target: an arm so fast counts as meeting it."""


def compare(config: WorkflowConfig, storage: RunStorage) -> tuple[dict[str, Any], Figure]:
    """All points, JSON-ready, and their picture: quality against measured speed."""
    config = dataclasses.replace(config, storage_path=storage.root)
    num_gpus = int(config.evaluate.use_gpu)
    spec, macs = ray.get(ray.remote(_model_facts).remote(config))
    routers = _trained(config, storage, num_gpus)
    arms: list[tuple[Entry | None, Arm]] = [(None, full_arm(config.sampler))]
    for target in config.compare.targets:
        of_target = [(entry, learned_arm(entry, artifact)) for entry, artifact in routers.items()]
        arms += [(entry, arm) for entry, arm in of_target if entry.target == target]
        arms += unlearned(config.sampler, macs, target, config.compare.seeds)
    if config.compare.libraries and spec.prompts is None and config.sampler.name == "ddim":
        arms += [(None, arm) for arm in library_arms(config.model.path, config.sampler)]
    plain = [arm for _, arm in arms]
    timed = ray.remote(num_cpus=1, num_gpus=num_gpus)(_times)
    seconds, spread = ray.get(timed.remote(config, spec, plain))
    settings = dataclasses.replace(config.evaluate, samples=config.compare.samples)
    quality = judge(dataclasses.replace(config, evaluate=settings), spec, plain)
    full = quality[FULL]
    points = [
        _point(entry, arm, seconds, macs) | quality[arm.name]
        for entry, arm in arms
        if arm.name != arm.reference
    ]
    return {
        "num_inference_steps": config.sampler.num_inference_steps,
        "sampler": config.sampler.name,
        "samples": config.compare.samples,
        "seconds_spread": max(spread.values()),
        "full": full,
        "points": points,
        "speeds": (speeds := ahead(points, config.compare.targets)),
        "verdict": verdict(speeds),
    }, comparison_picture(points)


def _model_facts(config: WorkflowConfig) -> tuple[RowSpec, Macs]:
    model = load_model(config.model).model
    return row_spec(config, model, config.seed + SEED_OFFSET), model.macs()


def _trained(config: WorkflowConfig, storage: RunStorage, num_gpus: int) -> dict[Entry, RouterArtifact]:
    """A router of each learning method, speed and seed, as many at once as there are cores or GPUs."""
    wanted: dict[Entry, TrainConfig] = {}
    for seed in range(config.compare.seeds):
        for target in config.compare.targets:
            settings = learners(config.train, target, rivals=config.compare.learners)
            wanted |= {Entry(method, target, seed): train for method, train in settings.items()}
    task = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=3)(_train_one)
    left = {
        e: train for e, train in wanted.items() if not storage.exists(f"{_place(storage, e)}/config.json")
    }
    ray.get([task.remote(config, entry, train) for entry, train in left.items()])
    return {entry: RouterArtifact.load(storage.download_folder(_place(storage, entry))) for entry in wanted}


def _place(storage: RunStorage, entry: Entry) -> str:
    return f"{work_folder('compare', storage)}/{entry.name}"


def _train_one(config: WorkflowConfig, entry: Entry, train: TrainConfig) -> None:
    quiet_libraries()
    config = dataclasses.replace(config, train=train, seed=config.seed + 1000 * entry.seed)
    run, spec = start_run(config, device_of(config.evaluate.use_gpu))
    for _ in trained(run, spec, Share(train.batch_size)):
        pass
    storage = RunStorage(config.storage_path, config.run_id, patient=True)
    with tempfile.TemporaryDirectory() as folder:
        storage.upload_folder(run.artifact().save(folder), _place(storage, entry))


def _times(
    config: WorkflowConfig, spec: RowSpec, arms: list[Arm]
) -> tuple[dict[str, float], dict[str, float]]:
    settings, device = config.evaluate, device_of(config.evaluate.use_gpu)
    model = load_model(config.model, device).model
    batch = Batch.of(make_rows(np.arange(settings.timing_batch_size), spec), spec, device)
    return median_times(arms, model, batch, settings.timing_rounds)


def _point(entry: Entry | None, arm: Arm, seconds: dict[str, float], macs: Macs) -> dict[str, Any]:
    measured = seconds[arm.reference] / seconds[arm.name]
    point: dict[str, Any] = {"num_inference_steps": arm.num_inference_steps, "speedup": measured}
    if entry is None:
        assert isinstance(arm, LibraryArm)
        return point | {"method": arm.library, "setting": arm.setting}
    point |= {"method": entry.method, "target_speedup": entry.target, "seed": entry.seed}
    if arm.plan is not None:
        return point | {"cur": arm.plan.cur, "ideal_speedup": arm.plan.ideal_speedup(macs)}
    return point


def verdict(speeds: list[dict[str, Any]]) -> str:
    """In words, for the report and the last line."""
    first = sum(said["is_first"] for said in speeds)
    lost = [
        f"{said['target_speedup']:g}x ({said['rival']}: {said['rival_psnr_to_full']:.1f} dB, ours "
        f"{said['psnr_to_full']:.1f})"
        for said in speeds
        if not said["is_first"]
    ]
    words = f"HarmoniCa is first at {first} of {len(speeds)} speeds"
    return words + (f", not at {', '.join(lost)}." if lost else ".")


def ahead(points: list[dict[str, Any]], targets: tuple[float, ...]) -> list[dict[str, Any]]:
    """At each speed: how near HarmoniCa's images are, the nearest rival, and who is ahead.

    A rival is any arm as fast: one made for the speed, or a library's whose measured speed is near it.
    """

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    said = []
    for target in targets:
        ours = [p["psnr_to_full"] for p in points if p["method"] == OURS and p["target_speedup"] == target]
        rivals: dict[str, list[float]] = {}
        for point in points:
            is_as_fast = (
                point["target_speedup"] == target
                if "target_speedup" in point
                else point["speedup"] >= _NEAR * target
            )
            if is_as_fast and point["method"] != OURS:
                name = point["method"] + (f" {point['setting']:g}" if "setting" in point else "")
                rivals.setdefault(name, []).append(point["psnr_to_full"])
        best = max(rivals, key=lambda name: mean(rivals[name]), default="")
        nearest = mean(rivals[best]) if best else -math.inf
        said.append(
            {
                "target_speedup": target,
                "psnr_to_full": mean(ours),
                "rival": best,
                "rival_psnr_to_full": nearest if best else None,
                "is_first": mean(ours) > nearest,
            }
        )
    return said
