"""Evaluate the images of variants that sample the same rows.

A pool of actors samples a Ray Data stream and returns metrics and features, not images, so that the same
code serves 50,000 samples.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from harmonica.data.samples import Shard
from harmonica.evaluation import fashion_captions as captions
from harmonica.evaluation.accumulators import MetricAccumulator
from harmonica.evaluation.reference_sets import ReferenceSet
from harmonica.evaluation.report import Resamples, distances_to_full, variant_metrics
from harmonica.validation.finite import check_finite

from ..config.evaluate import EvaluateConfig
from ..config.workflow import WorkflowConfig
from ..data.rows import Rows
from ..data.stream import stream_samples
from ..runtime.ray_runtime import quiet_libraries
from .latency import device_of
from .metric_networks import MetricSuite, feature_kind, read_reference
from .open_model import open_model
from .variants import Variant

NOISE_FLOOR = "noise_floor"
_OTHER_SEED = 1  # from the evaluation's: rows that neither training nor any variant has seen


def evaluate_images(config: WorkflowConfig, spec: Rows, variants: list[Variant]) -> dict[str, dict[str, Any]]:
    """Return the metrics of each variant by name, JSON-ready.

    They are over `evaluate.samples` images.

    The reference of the first variant also has `noise_floor`: the distances of its images to its images from
    another seed.

    Args:
        variants: any number, each after its reference.

    Raises:
        ValueError: a variant comes before its reference, or two have the same name.
    """
    _check_variants(variants)
    # On a worker of this node: Ray logs to the console of the process that creates a stream's actors.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    task = ray.remote(num_cpus=0)(_accumulate_on_worker).options(scheduling_strategy=here)
    accumulators = ray.get(task.remote(config, spec, variants))
    with few_threads(config):
        return _quality(config, variants, accumulators)


@contextmanager
def few_threads(config: WorkflowConfig) -> Iterator[None]:
    """Use one thread for statistics of the classifier's features.

    The features are so few that more threads gain nothing, and on busy cores they wait for each other.
    """
    threads = torch.get_num_threads()
    if feature_kind(config.evaluate, config.model) == "classifier":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def real_name(config: WorkflowConfig) -> str:
    """Return the suffix of the names of distances to real images."""
    return "reference" if config.evaluate.features == "inception" else "test"


def _quality(
    config: WorkflowConfig, variants: list[Variant], accumulators: dict[str, MetricAccumulator]
) -> dict[str, dict[str, Any]]:
    real = real_images(config)
    resamples = Resamples.of(accumulators[variants[0].name], config.evaluate.resamples, config.seed)
    quality = {}
    for variant in variants:
        full = None if variant.name == variant.reference else accumulators[variant.reference]
        quality[variant.name] = variant_metrics(
            accumulators[variant.name], full, real, resamples, real_name(config)
        )
    if NOISE_FLOOR in accumulators:
        first = variants[0].reference
        quality[first][NOISE_FLOOR] = distances_to_full(
            accumulators[NOISE_FLOOR], accumulators[first], resamples
        )
    return quality


def _check_variants(variants: list[Variant]) -> None:
    names: list[str] = []
    for variant in variants:
        if variant.name in (*names, NOISE_FLOOR):
            raise ValueError(
                f"two variants are named {variant.name!r}: give each its own name, and none {NOISE_FLOOR!r}"
            )
        names.append(variant.name)
        if variant.reference not in names:
            raise ValueError(
                f"variant {variant.name!r} comes before its reference {variant.reference!r}: put it after"
            )


class VariantSampler:
    """A Ray Data actor that samples variants and returns metric columns, no images."""

    def __init__(self, config: WorkflowConfig, spec: Rows, variants: list[Variant]) -> None:
        self.variants, self.spec = variants, spec
        self.device = device_of(config.evaluate.use_gpu)
        self.model = open_model(config, self.device)
        self.metrics = MetricSuite(config, self.model, self.device)
        self.has_noise_floor = config.evaluate.noise_floor and self.metrics.extractor is not None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        out, _ = self.measure(batch, self.variants, {})
        if self.has_noise_floor:
            out |= self.measure_other_noise(
                batch["index"], self.variants[0]
            )  # the first one is its own reference
        return out

    def measure(
        self, batch: dict[str, np.ndarray], variants: list[Variant], known: Mapping[str, Tensor]
    ) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
        """Return the metric columns of all variants on these rows, and their samples.

        Args:
            known: samples of references that are not among the variants, from the same rows.

        Raises:
            NotFinite: a variant's images are not finite.
        """
        rows, sampled = self.spec.to_batch(batch, self.device), dict(known)
        images = {name: self.metrics.decode(samples) for name, samples in sampled.items()}
        prompts = self._prompts(batch["label"])
        out = {"index": batch["index"], "label": self._classes(batch["label"], prompts)}
        for variant in variants:
            sampled[variant.name] = samples = self.model.sample(variant, rows)
            images[variant.name] = decoded = self.metrics.decode(samples)
            check_finite(decoded, f"images of variant {variant.name!r} are")
            columns = self.metrics.features(decoded) | self.metrics.prompt_scores(decoded, prompts)
            if variant.name != variant.reference:
                columns |= self.metrics.compare(decoded, images[variant.reference])
            out |= {f"{variant.name}.{name}": column for name, column in columns.items()}
        return out, {variant.name: sampled[variant.name] for variant in variants}

    def measure_other_noise(self, index: np.ndarray, reference: Variant) -> dict[str, np.ndarray]:
        """Return features of a reference's samples under another seed."""
        other = self.spec.with_other_noise(_OTHER_SEED)
        samples = self.model.sample(reference, other.to_batch(other.make(index), self.device))
        images = self.metrics.decode(samples)
        check_finite(images, f"images of variant {reference.name!r} are")
        columns = self.metrics.features(images)
        return {f"{NOISE_FLOOR}.{name}": column for name, column in columns.items()}

    def _prompts(self, labels: np.ndarray) -> list[str] | None:
        """Return the text of the prompts if a metric uses it."""
        read = self.metrics.is_classifier or self.metrics.clip is not None
        return self.spec.texts(labels) if read else None

    def _classes(self, labels: np.ndarray, prompts: list[str] | None) -> np.ndarray:
        """Return the class that each image should show.

        It is -1 for prompts whose class is not known.
        """
        if self.spec.texts(labels[:0]) is None:
            return labels
        known, texts = set(captions.all_captions()), [prompt.lower() for prompt in prompts or []]
        meant = [captions.meaning(text)[0] if text in known else -1 for text in texts]
        return np.array(meant or [-1] * len(labels))


def _accumulate_on_worker(
    config: WorkflowConfig, spec: Rows, variants: list[Variant]
) -> dict[str, MetricAccumulator]:
    quiet_libraries()
    ray.data.DataContext.get_current().enable_progress_bars = False
    return _collect(config, variants, _metric_batches(config, spec, variants))


def _metric_batches(
    config: WorkflowConfig, spec: Rows, variants: list[Variant]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of per-image metrics and features of every variant."""
    settings: EvaluateConfig = config.evaluate
    # A block a batch: with fewer blocks than actors some would idle.
    rows = stream_samples(
        spec, Shard(batch_size=1), trajectories=settings.samples, samples_per_block=settings.batch_size
    )
    blocks = -(-settings.samples // settings.batch_size)
    columns = rows.map_batches(
        VariantSampler,
        fn_constructor_kwargs={"config": config, "spec": spec, "variants": variants},
        compute=ActorPoolStrategy(size=min(settings.num_actors, blocks)),  # more would idle
        batch_size=settings.batch_size,
        num_cpus=1,
        num_gpus=1 if settings.use_gpu else None,
    )
    yield from columns.iter_batches(batch_size=None, batch_format="numpy")


def _collect(
    config: WorkflowConfig, variants: list[Variant], batches: Iterator[dict[str, np.ndarray]]
) -> dict[str, MetricAccumulator]:
    """Return an accumulator by variant; each batch is released once it is added."""
    accumulators: dict[str, MetricAccumulator] = {}
    for batch in batches:
        accumulate(accumulators, variants, batch, config.evaluate.samples)
    return accumulators


def accumulate(
    accumulators: dict[str, MetricAccumulator],
    variants: list[Variant],
    batch: dict[str, np.ndarray],
    count: int,
) -> None:
    """Add columns to the variants' accumulators, each of `count` images in all."""
    index, label = batch.pop("index"), batch.pop("label")
    columns = {variant.name: {"label": label} for variant in variants}
    for name, column in batch.items():
        variant_name, kind = name.rsplit(".", 1)
        columns.setdefault(variant_name, {})[kind] = column
    for variant_name, values in columns.items():
        accumulators.setdefault(variant_name, MetricAccumulator(count)).add(index, values)


def real_images(config: WorkflowConfig) -> ReferenceSet | None:
    """Return the statistics of the real images.

    They are computed on a worker if that takes a network.
    """
    if feature_kind(config.evaluate, config.model) != "inception":
        return read_reference(config, device_of(False))
    use_gpu = config.evaluate.use_gpu
    remote = ray.remote(num_cpus=1, num_gpus=int(use_gpu))(read_reference)
    return ray.get(remote.remote(config, device_of(use_gpu)))
