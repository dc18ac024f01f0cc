"""Speed, arm beside arm on one worker: full, cached, and the fewer steps that take as long as cached."""

import math
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harmonica.artifact import RouterArtifact
from harmonica.cache import Reuse
from harmonica.models.dit import DiT
from harmonica.models.loading import load_model
from harmonica.plan import Plan
from harmonica.samplers import Ddim
from harmonica.sampling import sample
from pipelines.config import WorkflowConfig
from pipelines.stream import RowSpec, make_rows

FULL, CACHED, FEWER = "full", "cached", "fewer_steps"
SEED_OFFSET = 1
"""Evaluation draws other rows than training."""


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

    rows: RowSpec
    """The model's rows, so that nobody has to load it to know them."""
    seconds_per_image: dict[str, float]
    spread: dict[str, float]
    """(slowest - fastest) / median of the rounds."""
    fewer_steps: int
    sheet: dict[str, Tensor]
    class_names: tuple[str, ...]
    branch_names: tuple[str, ...]
    sheet_labels: list[int]


def device_of(use_gpu: bool) -> torch.device:
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


def make_arms(config: WorkflowConfig, artifact: RouterArtifact, fewer_steps: int = 2) -> list[Arm]:
    """Full, cached and fewer steps, in this order."""
    total = config.sampler.num_inference_steps
    cached = Arm(CACHED, total, artifact.plan, artifact.reuse)
    return [Arm(FULL, total), cached, Arm(FEWER, fewer_steps)]


def measure(config: WorkflowConfig, artifact: RouterArtifact) -> Timing:
    """Time the arms; `fewer_steps` gets the least step count whose time is not below the cached arm's."""
    settings, device = config.evaluate, device_of(config.evaluate.use_gpu)
    loaded = load_model(config.model)
    model = loaded.model.to(device)
    spec = RowSpec.of(model, model.num_classes, config.seed + SEED_OFFSET)
    rows = make_rows(np.arange(settings.timing_batch_size), spec)
    noise, label = torch.from_numpy(rows["noise"]).to(device), torch.from_numpy(rows["label"]).to(device)
    total = config.sampler.num_inference_steps
    first, _ = _median_times(
        make_arms(config, artifact)[:2], model, config, (noise, label), min(3, settings.timing_rounds)
    )
    steps = min(total, max(2, math.ceil(total * first[CACHED] / first[FULL] - 0.1)))
    arms = make_arms(config, artifact, steps)
    seconds, spread = _median_times(arms, model, config, (noise, label), settings.timing_rounds)
    labels = [i % model.num_classes for i in range(10)]
    noise = torch.from_numpy(make_rows(np.arange(10), spec)["noise"]).to(device)
    sheet = {
        arm.name: arm.sample(model, config, noise, torch.tensor(labels, device=device)).cpu() for arm in arms
    }
    branches = tuple(branch.name for branch in model.branches)
    return Timing(spec, seconds, spread, steps, sheet, loaded.class_names, branches, labels)
