"""Measure latency on one worker: full, cached, and fewer steps that take as long."""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.evaluation.evaluation_report import CACHED, FULL
from harmonica.models.vae import decode_latents
from harmonica.validation.finite import check_finite

from ..config.workflow import WorkflowConfig
from ..data.rows import Rows
from .evaluated_model import EvaluatedModel
from .open_model import open_model
from .variants import Variant, make_family_variants, make_variants

SEED_OFFSET = 1
"""Offset from the training seed, so that evaluation samples other rows than training."""
_SHEET = 10
_TRIES = 3


@dataclass(frozen=True)
class Timing:
    """The times that one worker measured, and ten images of each variant.

    The images are from the same noise.
    """

    rows: Rows
    """The model's rows, kept so that the model need not be loaded again to know them."""
    seconds_per_image: dict[str, float]
    spread: dict[str, float]
    """(slowest - fastest) / median of the rounds."""
    fewer_steps: int
    sheet: dict[str, Tensor]
    sheet_names: list[str]
    """The class or prompt of each image of the sheet."""
    branch_names: tuple[str, ...]

    def speedup(self, name: str) -> float:
        """Return a variant's measured speedup over full sampling."""
        return self.seconds_per_image[FULL] / self.seconds_per_image[name]


def device_of(use_gpu: bool) -> torch.device:
    """Return the device of a worker."""
    return torch.device("cuda" if use_gpu else "cpu")


def _seconds(variant: Variant, model: EvaluatedModel, batch: Any) -> float:
    started = time.perf_counter()
    model.run(variant, batch)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def median_times(
    variants: list[Variant], model: EvaluatedModel, batch: Any, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return median seconds per image and the relative spread.

    The variants alternate after warming up.
    """
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    first = model.warm_ups
    for turn in range(rounds + first):
        for variant in variants:
            seconds = _seconds(variant, model, batch) / len(batch)
            if turn >= first:
                times[variant.name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    spread = {name: (max(v) - min(v)) / medians[name] for name, v in times.items()}
    return medians, spread


def steps_as_long(total: int, seconds: Mapping[str, float]) -> int:
    """Return the fewest steps that take no less time than the cached variant.

    A tenth of a step is tolerated.
    """
    return min(total, max(2, math.ceil(total * seconds[CACHED] / seconds[FULL] - 0.1)))


def measure(config: WorkflowConfig, artifact: RouterArtifact, family: Mapping[str, RouterArtifact]) -> Timing:
    """Time all variants, those of the family too.

    The step count of `fewer_steps` is derived again from the final times (up to 3 tries), so that the two are
    consistent unless the machine is too noisy.

    Raises:
        NotFinite: a variant's images are not finite.
    """
    settings, device = config.evaluate, device_of(config.evaluate.use_gpu)
    model = open_model(config, device)
    spec = model.rows(config.seed + SEED_OFFSET)
    batch = spec.to_batch(spec.make(np.arange(settings.timing_batch_size)), device)
    total = config.sampler.num_inference_steps
    variants, steps = make_variants(config, artifact)[:2], total
    seconds, spread = median_times(variants, model, batch, min(2, settings.timing_rounds))
    for _ in range(_TRIES):
        steps = steps_as_long(total, seconds)
        variants = make_variants(config, artifact, steps) + make_family_variants(config, family)
        seconds, spread = median_times(variants, model, batch, settings.timing_rounds)
        if steps_as_long(total, seconds) == steps:
            break
    columns, names = _sheet_rows(spec, model.class_names)
    shown = spec.to_batch(columns, device)
    sheet = {variant.name: model.sample(variant, shown) for variant in variants}
    if not model.draws_pixels and (vae := model.load_vae()) is not None:
        sheet = {name: decode_latents(vae, latents) for name, latents in sheet.items()}
    sheet = {name: images.cpu() for name, images in sheet.items()}
    for name, images in sheet.items():
        check_finite(images, f"images of variant {name!r} are")
    return Timing(spec, seconds, spread, steps, sheet, names, model.branch_names(artifact))


def _sheet_rows(spec: Rows, class_names: tuple[str, ...]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the rows of the sheet and their names.

    They are one row of each class, or those of the first prompts.
    """
    columns = spec.make(np.arange(_SHEET))
    if (prompts := spec.texts(columns["label"])) is not None:
        return columns, prompts
    labels = np.arange(_SHEET) % len(class_names)
    return columns | {"label": labels}, [class_names[label] for label in labels]
