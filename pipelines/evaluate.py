"""Judge a router: the same noise sampled full, cached, and with fewer steps at equal measured time.

Speed is measured arm beside arm on one worker; images are sampled by a pool of actors over a Ray Data
stream, which hand back numbers, not images, so 50,000 samples are the same code.
"""

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from matplotlib.figure import Figure
from ray.data import ActorPoolStrategy
from torch import Tensor

from harmonica.artifact import RouterArtifact
from harmonica.cache import Reuse
from harmonica.classifier import (
    BUILTIN_FOLDER,
    STATISTICS_FILE,
    FeatureStatistics,
    features_and_logits,
    load_classifier,
)
from harmonica.models.dit import DiT
from harmonica.models.loading import BUILTIN, ModelConfig, load_model
from harmonica.pictures import router_heat_map, sample_sheet
from harmonica.plan import Plan
from harmonica.samplers import Ddim
from harmonica.sampling import sample
from pipelines.config import EvaluateConfig, WorkflowConfig
from pipelines.stream import RowSpec, Share, make_rows, stream_rows

FULL, CACHED, FEWER = "full", "cached", "fewer_steps"
_SHEET_SEED_OFFSET = 1


@dataclass(frozen=True)
class Arm:
    """One way to sample the same noise."""

    name: str
    num_inference_steps: int
    plan: Plan | None = None
    reuse: Reuse = "hold"

    def sample(self, model: DiT, config: WorkflowConfig, noise: Tensor, label: Tensor) -> Tensor:
        settings = config.sampler.to_dict() | {"num_inference_steps": self.num_inference_steps}
        sampler = Ddim(model, type(config.sampler)(**settings))
        return sample(sampler, noise, label, self.plan, reuse=self.reuse)


@dataclass(frozen=True)
class Timing:
    """What one worker measured, and ten images an arm of the same noise for people to look at."""

    seconds_per_image: dict[str, float]
    spread: dict[str, float]
    """(slowest - fastest) / median of the rounds."""
    fewer_steps: int
    sheet: dict[str, Tensor]
    class_names: tuple[str, ...]
    branch_names: tuple[str, ...]
    sheet_labels: list[int]


def _device(use_gpu: bool) -> torch.device:
    return torch.device("cuda" if use_gpu else "cpu")


def _seconds(arm: Arm, model: DiT, config: WorkflowConfig, noise: Tensor, label: Tensor) -> float:
    started = time.perf_counter()
    arm.sample(model, config, noise, label)
    if noise.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _median_times(
    arms: list[Arm], model: DiT, config: WorkflowConfig, rows: tuple[Tensor, Tensor], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds per image and relative spread; arms alternate, each warmed up once."""
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for turn in range(rounds + 1):
        for arm in arms:
            seconds = _seconds(arm, model, config, *rows) / len(rows[0])
            if turn > 0:
                times[arm.name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    spread = {name: (max(v) - min(v)) / medians[name] for name, v in times.items()}
    return medians, spread


def measure(config: WorkflowConfig, artifact: RouterArtifact) -> Timing:
    """Time the arms; `fewer_steps` gets the least step count whose time is not below the cached arm's."""
    settings, device = config.evaluate, _device(config.evaluate.use_gpu)
    loaded = load_model(config.model)
    model = loaded.model.to(device)
    spec = RowSpec.of(model, model.num_classes, config.seed + _SHEET_SEED_OFFSET)
    rows = make_rows(np.arange(settings.timing_batch_size), spec)
    noise, label = torch.from_numpy(rows["noise"]).to(device), torch.from_numpy(rows["label"]).to(device)
    total = config.sampler.num_inference_steps
    full, cached = Arm(FULL, total), Arm(CACHED, total, artifact.plan, artifact.reuse)
    first, _ = _median_times([full, cached], model, config, (noise, label), min(3, settings.timing_rounds))
    steps = min(total, max(2, math.ceil(total * first[CACHED] / first[FULL] - 0.1)))
    arms = [full, cached, Arm(FEWER, steps)]
    seconds, spread = _median_times(arms, model, config, (noise, label), settings.timing_rounds)
    labels = [i % model.num_classes for i in range(10)]
    noise = torch.from_numpy(make_rows(np.arange(10), spec)["noise"]).to(device)
    sheet = {
        arm.name: arm.sample(model, config, noise, torch.tensor(labels, device=device)).cpu() for arm in arms
    }
    branches = tuple(branch.name for branch in model.branches)
    return Timing(seconds, spread, steps, sheet, loaded.class_names, branches, labels)


class ArmSampler:
    """A Ray Data actor: samples every arm from the same rows and hands back what judging needs."""

    def __init__(self, config: WorkflowConfig, arms: list[Arm], judge: bool) -> None:
        self.config, self.arms = config, arms
        self.device = _device(config.evaluate.use_gpu)
        self.model = load_model(config.model).model.to(self.device)
        self.classifier = load_classifier() if judge else None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        from harmonica.metrics import psnr  # seconds to import, so only where images are judged

        noise = torch.tensor(batch["noise"], device=self.device)  # a copy: Ray's batches are read-only
        label = torch.tensor(batch["label"], device=self.device)
        out = {"label": batch["label"]}
        reference = None
        for arm in self.arms:
            images = arm.sample(self.model, self.config, noise, label).cpu()
            reference = images if reference is None else reference
            out[f"{arm.name}.psnr"] = psnr(images, reference).clamp(max=100).numpy()
            if self.classifier is not None:
                features, logits = features_and_logits(self.classifier, images)
                out[f"{arm.name}.features"] = features.numpy()
                out[f"{arm.name}.class"] = logits.argmax(1).numpy()
        return out


def _judged(config: WorkflowConfig, arms: list[Arm], judge: bool) -> Iterator[dict[str, np.ndarray]]:
    """Batches of per-image numbers of every arm."""
    settings: EvaluateConfig = config.evaluate
    model = load_model(config.model).model
    spec = RowSpec.of(model, model.num_classes, config.seed + _SHEET_SEED_OFFSET)
    # A block a batch: with fewer blocks than actors some would idle.
    rows = stream_rows(
        spec, Share(batch_size=1), trajectories=settings.samples, rows_per_block=settings.batch_size
    )
    judged = rows.map_batches(
        ArmSampler,
        fn_constructor_kwargs={"config": config, "arms": arms, "judge": judge},
        compute=ActorPoolStrategy(size=settings.num_actors),
        batch_size=settings.batch_size,
        num_cpus=1,
        num_gpus=1 if settings.use_gpu else None,
    )
    yield from judged.iter_batches(batch_size=None, batch_format="numpy")


def _can_be_judged(model: ModelConfig) -> bool:
    """The shipped classifier knows the built-in model's images only."""
    return model.path == BUILTIN


def evaluate(config: WorkflowConfig, artifact: RouterArtifact) -> tuple[dict[str, Any], dict[str, Figure]]:
    """The report of one router, JSON-ready, and its pictures by file name."""
    settings = config.evaluate
    cpus, gpus = (1, 1) if settings.use_gpu else (1, 0)
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus)(measure)
    timing: Timing = ray.get(remote.remote(config, artifact))
    total = config.sampler.num_inference_steps
    arms = [
        Arm(FULL, total),
        Arm(CACHED, total, artifact.plan, artifact.reuse),
        Arm(FEWER, timing.fewer_steps),
    ]
    judge = _can_be_judged(config.model)
    columns = _collect(_judged(config, arms, judge))
    report_arms = {arm.name: _arm_report(arm, columns, timing, judge) for arm in arms}
    seconds = timing.seconds_per_image
    measured = seconds[FULL] / seconds[CACHED]
    saved = 1 - 1 / artifact.ideal_speedup
    report = {
        "samples": len(columns["label"]),
        "cur": artifact.plan.cur,
        "reuse": artifact.reuse,
        "ideal_speedup": artifact.ideal_speedup,
        "measured_speedup": measured,
        "realised_share": (1 - 1 / measured) / saved if saved > 0 else None,
        "arms": report_arms,
    }
    return report | verdict(report_arms), _pictures(config, artifact, timing)


def _pictures(config: WorkflowConfig, artifact: RouterArtifact, timing: Timing) -> dict[str, Figure]:
    """Full above cached above fewer steps, same noise; and the router."""
    titles = {
        FULL: f"full, {config.sampler.num_inference_steps} steps",
        CACHED: f"cached, CUR {artifact.plan.cur:.0%}",
        FEWER: f"{timing.fewer_steps} steps",
    }
    rows = {titles[name]: images for name, images in timing.sheet.items()}
    pictures = {
        "router.png": router_heat_map(
            artifact.logits_TB.sigmoid(), artifact.plan.to_tensor(), timing.branch_names
        )
    }
    if next(iter(rows.values())).shape[1] in (1, 3):  # pixels; latents want their VAE
        names = [timing.class_names[label] for label in timing.sheet_labels]
        pictures["samples.png"] = sample_sheet(rows, names, title="Same noise, same classes")
    return pictures


def _collect(batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    kept = list(batches)
    return {name: np.concatenate([batch[name] for batch in kept]) for name in kept[0]}


def _arm_report(arm: Arm, columns: dict[str, np.ndarray], timing: Timing, judge: bool) -> dict[str, Any]:
    from harmonica.metrics import frechet_distance

    report: dict[str, Any] = {
        "num_inference_steps": arm.num_inference_steps,
        "seconds_per_image": timing.seconds_per_image[arm.name],
        "seconds_spread": timing.spread[arm.name],
        "speedup": timing.seconds_per_image[FULL] / timing.seconds_per_image[arm.name],
    }
    if arm.name != FULL:
        report["psnr_to_full"] = float(columns[f"{arm.name}.psnr"].mean())
    if judge:
        statistics_of = {
            name: FeatureStatistics.from_features(torch.from_numpy(columns[f"{name}.features"].copy()))
            for name in (arm.name, FULL)
        }
        test = FeatureStatistics.load(BUILTIN_FOLDER / STATISTICS_FILE)
        report["frechet_to_test"] = frechet_distance(statistics_of[arm.name], test)
        report["label_accuracy"] = float((columns[f"{arm.name}.class"] == columns["label"]).mean())
        if arm.name != FULL:
            report["frechet_to_full"] = frechet_distance(statistics_of[arm.name], statistics_of[FULL])
            report["label_agreement"] = float(
                (columns[f"{arm.name}.class"] == columns[f"{FULL}.class"]).mean()
            )
    return report


def verdict(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Whether the router is worth having: nearer to the full images than fewer steps at equal time."""
    cached, fewer = arms[CACHED], arms[FEWER]
    nearer = {"PSNR": cached["psnr_to_full"] > fewer["psnr_to_full"]}
    if "frechet_to_full" in cached:
        nearer["Frechet distance"] = cached["frechet_to_full"] < fewer["frechet_to_full"]
    rival = f"DDIM-{fewer['num_inference_steps']} at the same measured time"
    won, lost = [n for n, ok in nearer.items() if ok], [n for n, ok in nearer.items() if not ok]
    if not lost:
        words = f"Worth having: nearer to the full sampler's images than {rival}, by {' and '.join(won)}."
    else:
        words = (
            f"Not worth having as trained: {rival} is nearer to the full sampler's images by "
            f"{' and '.join(lost)}. Train longer (train.trajectories) or reuse less (train.target_cur)."
        )
    return {"worth_having": not lost, "verdict": words}
