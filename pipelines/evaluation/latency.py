"""Speed, arm beside arm on one worker: full, cached, and the fewer steps that take as long as cached."""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch, RowSpec, make_rows
from harmonica.models.base import BranchedTransformer
from harmonica.models.loading import load_model
from harmonica.models.vae import decode_latents, draws_pixels
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.validation.finite import check_finite
from pipelines.config.workflow import WorkflowConfig
from pipelines.data.stream import row_spec

FULL, CACHED, FEWER = "full", "cached", "fewer_steps"
SEED_OFFSET = 1
"""Evaluation draws other rows than training."""
_SHEET = 10
_TRIES = 3


@dataclass(frozen=True)
class Arm:
    """One way to sample the same noise."""

    name: str
    sampler: SamplerConfig
    plan: Plan | None = None
    reuse: Reuse = "hold"
    reference: str = FULL
    """The arm whose images are the ones to be near to."""

    @property
    def num_inference_steps(self) -> int:
        return self.sampler.num_inference_steps

    def sample(self, model: BranchedTransformer, batch: Batch) -> Tensor:
        sampler = make_sampler(model, self.sampler)
        return sample(
            sampler, batch.noise_NCHW, batch.condition_N, self.plan, reuse=self.reuse, rows=batch.keys
        )


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
    sheet_names: list[str]
    """What each of them was asked to show."""
    branch_names: tuple[str, ...]


def device_of(use_gpu: bool) -> torch.device:
    return torch.device("cuda" if use_gpu else "cpu")


def _seconds(arm: Arm, model: BranchedTransformer, batch: Batch) -> float:
    started = time.perf_counter()
    arm.sample(model, batch)
    if batch.noise_NCHW.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def median_times(
    arms: list[Arm], model: BranchedTransformer, batch: Batch, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds per image and relative spread; arms alternate, each warmed up once."""
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for turn in range(rounds + 1):
        for arm in arms:
            seconds = _seconds(arm, model, batch) / len(batch)
            if turn > 0:
                times[arm.name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    spread = {name: (max(v) - min(v)) / medians[name] for name, v in times.items()}
    return medians, spread


def make_arms(config: WorkflowConfig, artifact: RouterArtifact, fewer_steps: int = 2) -> list[Arm]:
    """Full, cached and fewer steps, in this order."""
    cached = Arm(CACHED, config.sampler, artifact.plan, artifact.reuse)
    fewer = replace(config.sampler, num_inference_steps=fewer_steps)
    return [Arm(FULL, config.sampler), cached, Arm(FEWER, fewer)]


def make_family_arms(config: WorkflowConfig, family: Mapping[str, RouterArtifact]) -> list[Arm]:
    """One a member, named by `family_arm`."""
    return [Arm(family_arm(name), config.sampler, one.plan, one.reuse) for name, one in family.items()]


def family_arm(name: str) -> str:
    return f"{CACHED} {name}"


def transfer_samplers(config: WorkflowConfig) -> dict[str, SamplerConfig]:
    """By title: each other sampler, guidance and T of `evaluate`."""
    others: dict[str, SamplerConfig] = {}
    for name in config.evaluate.transfer:
        others[name] = replace(config.sampler, name=name, scheduler=None)
    for scale in config.evaluate.transfer_guidance:
        others[f"guidance {scale:g}"] = replace(config.sampler, guidance_scale=scale)
    for steps in config.evaluate.transfer_steps:
        others[f"{steps} steps"] = replace(config.sampler, num_inference_steps=steps)
    return others


def make_transfer_arms(config: WorkflowConfig, artifact: RouterArtifact) -> list[Arm]:
    """Full and cached under each of `transfer_samplers`: the plan was made for none."""
    arms = []
    for title, other in transfer_samplers(config).items():
        plan = artifact.plan.at_steps(other.num_inference_steps)
        full = f"{title} {FULL}"
        arms.append(Arm(full, other, reference=full))
        arms.append(Arm(f"{title} {CACHED}", other, plan, artifact.reuse, reference=full))
    return arms


def steps_as_long(total: int, seconds: Mapping[str, float]) -> int:
    """The least step count whose time is not below the cached arm's, to a tenth of a step."""
    return min(total, max(2, math.ceil(total * seconds[CACHED] / seconds[FULL] - 0.1)))


def measure(config: WorkflowConfig, artifact: RouterArtifact, family: Mapping[str, RouterArtifact]) -> Timing:
    """Time the arms, those of the family too; the step count of `fewer_steps` fits the times that are
    reported beside it, as far as a busy machine lets them be measured alike twice.

    Raises:
        NotFinite: an arm draws what is not finite.
    """
    settings, device = config.evaluate, device_of(config.evaluate.use_gpu)
    loaded = load_model(config.model, device)
    model = loaded.model
    spec = row_spec(config, model, config.seed + SEED_OFFSET)
    batch = Batch.of(make_rows(np.arange(settings.timing_batch_size), spec), spec, device)
    total = config.sampler.num_inference_steps
    arms, steps = make_arms(config, artifact)[:2], total
    seconds, spread = median_times(arms, model, batch, min(2, settings.timing_rounds))
    for _ in range(_TRIES):
        steps = steps_as_long(total, seconds)
        arms = make_arms(config, artifact, steps) + make_family_arms(config, family)
        seconds, spread = median_times(arms, model, batch, settings.timing_rounds)
        if steps_as_long(total, seconds) == steps:
            break
    columns, names = _sheet_rows(spec, loaded.class_names)
    shown = Batch.of(columns, spec, device)
    sheet = {arm.name: arm.sample(model, shown) for arm in arms}
    if not draws_pixels(model) and (vae := loaded.load_vae(device)) is not None:
        sheet = {name: decode_latents(vae, latents) for name, latents in sheet.items()}
    sheet = {name: images.cpu() for name, images in sheet.items()}
    for name, images in sheet.items():
        check_finite(images, f"images of arm {name!r} are")
    return Timing(spec, seconds, spread, steps, sheet, names, tuple(b.name for b in model.branches))


def _sheet_rows(spec: RowSpec, class_names: tuple[str, ...]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Rows to look at and their names: one of each class, or prompts as they come."""
    columns = make_rows(np.arange(_SHEET), spec)
    if spec.prompts is not None:
        return columns, spec.prompts.rows(columns["label"]).prompts
    labels = np.arange(_SHEET) % spec.num_classes
    return columns | {"label": labels}, [class_names[label] for label in labels]
