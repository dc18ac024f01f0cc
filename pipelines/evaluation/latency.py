"""Measure latency on one worker: full sampling, cached, and the fewer steps that take as long as cached."""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.data.batch import Batch
from harmonica.data.samples import SampleSpec, make_samples
from harmonica.evaluation.evaluation_report import CACHED, FULL
from harmonica.execution.levels import warm_ups
from harmonica.models.base import BranchedTransformer
from harmonica.models.loading import load_model
from harmonica.models.vae import decode_latents, draws_pixels
from harmonica.validation.finite import check_finite

from ..config.workflow import WorkflowConfig
from ..data.stream import sample_spec
from .variants import Variant, make_family_variants, make_variants

SEED_OFFSET = 1
"""Offset from the training seed, so that evaluation samples other rows than training."""
_SHEET = 10
_TRIES = 3


@dataclass(frozen=True)
class Timing:
    """Times that one worker measured, and ten images of each variant from the same noise."""

    rows: SampleSpec
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


def _seconds(variant: Variant, model: BranchedTransformer, batch: Batch) -> float:
    started = time.perf_counter()
    variant.sample(model, batch)
    if batch.noise_NCHW.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def median_times(
    variants: list[Variant], model: BranchedTransformer, batch: Batch, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return median seconds per image and the relative spread; variants alternate after warming up."""
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    first = warm_ups(model)
    for turn in range(rounds + first):
        for variant in variants:
            seconds = _seconds(variant, model, batch) / len(batch)
            if turn >= first:
                times[variant.name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    spread = {name: (max(v) - min(v)) / medians[name] for name, v in times.items()}
    return medians, spread


def steps_as_long(total: int, seconds: Mapping[str, float]) -> int:
    """Return the least step count whose time is not below the cached variant's, to a tenth of a step."""
    return min(total, max(2, math.ceil(total * seconds[CACHED] / seconds[FULL] - 0.1)))


def measure(config: WorkflowConfig, artifact: RouterArtifact, family: Mapping[str, RouterArtifact]) -> Timing:
    """Time all variants, those of the family too.

    The step count of `fewer_steps` is derived again from the final times (up to 3 tries), so that the two are
    consistent unless the machine is too noisy.

    Raises:
        NotFinite: a variant's images are not finite.
    """
    settings, device = config.evaluate, device_of(config.evaluate.use_gpu)
    loaded = load_model(config.model, device)
    model = loaded.model
    spec = sample_spec(config, model, config.seed + SEED_OFFSET)
    batch = spec.to_batch(make_samples(np.arange(settings.timing_batch_size), spec), device)
    total = config.sampler.num_inference_steps
    variants, steps = make_variants(config, artifact)[:2], total
    seconds, spread = median_times(variants, model, batch, min(2, settings.timing_rounds))
    for _ in range(_TRIES):
        steps = steps_as_long(total, seconds)
        variants = make_variants(config, artifact, steps) + make_family_variants(config, family)
        seconds, spread = median_times(variants, model, batch, settings.timing_rounds)
        if steps_as_long(total, seconds) == steps:
            break
    columns, names = _sheet_rows(spec, loaded.class_names)
    shown = spec.to_batch(columns, device)
    sheet = {variant.name: variant.sample(model, shown) for variant in variants}
    if not draws_pixels(model) and (vae := loaded.load_vae(device)) is not None:
        sheet = {name: decode_latents(vae, latents) for name, latents in sheet.items()}
    sheet = {name: images.cpu() for name, images in sheet.items()}
    for name, images in sheet.items():
        check_finite(images, f"images of variant {name!r} are")
    return Timing(spec, seconds, spread, steps, sheet, names, tuple(b.name for b in model.branches))


def _sheet_rows(spec: SampleSpec, class_names: tuple[str, ...]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the rows of the sheet and their names: one of each class, or the first prompts."""
    columns = make_samples(np.arange(_SHEET), spec)
    if spec.prompts is not None:
        return columns, spec.prompts.rows(columns["label"]).prompts
    labels = np.arange(_SHEET) % spec.num_classes
    return columns | {"label": labels}, [class_names[label] for label in labels]
