"""Measure the variants of a comparison one by one, on workers that stay loaded.

The workers also keep the images of the reference variants. A result is complete as soon as its variant has
been measured, and a variant that fails does not affect the others.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

import numpy as np
import ray
import torch

from harmonica.data.samples import SampleSpec, make_samples
from harmonica.evaluation.accumulators import MetricAccumulator
from harmonica.evaluation.evaluation_report import FULL
from harmonica.evaluation.reference_sets import ReferenceSet
from harmonica.evaluation.report import Resamples, distances_to_full, variant_metrics

from ..config.workflow import WorkflowConfig
from ..evaluation.latency import median_times
from ..evaluation.quality import (
    NOISE_FLOOR,
    VariantSampler,
    accumulate,
    few_threads,
    real_images,
    real_name,
)
from ..evaluation.variants import Variant
from ..runtime.ray_runtime import quiet_libraries

_RETRIES = 2
"""Retries of a task whose worker is lost; a variant that crashes its worker every time is not measured."""
_PATIENCE_S = 60.0
_LONGEST = 300
Columns = dict[str, np.ndarray]


class NotMeasuredError(Exception):
    """Say why a variant cannot be measured."""


class VariantWorker:
    """A Ray actor that holds one model and the metric networks."""

    def __init__(self, config: WorkflowConfig, spec: SampleSpec) -> None:
        quiet_libraries()
        self.settings, self.spec = config.evaluate, spec
        self.sampler = VariantSampler(config, spec, [])
        self._variants: dict[str, Variant] = {}

    def started(self) -> None:
        """Return once the worker has been placed and has loaded its model."""

    def times(self, reference: Variant, variant: Variant) -> tuple[float, float]:
        """Return the speedup over the reference, and the spread of the times.

        Both are timed in turn.
        """
        indices = np.arange(self.settings.timing_batch_size)
        batch = self.spec.to_batch(make_samples(indices, self.spec), self.sampler.device)
        pair, rounds = [self._with_state(reference), self._with_state(variant)], self.settings.timing_rounds
        seconds, spread = median_times(pair, self.sampler.model, batch, rounds)
        return seconds[reference.name] / seconds[variant.name], max(spread.values())

    def measure(
        self, variant: Variant, rows: range, reference: np.ndarray | None
    ) -> tuple[Columns, np.ndarray | None]:
        """Return the variant's metric columns on these rows.

        With them come its samples if it is a reference, else None.

        Args:
            reference: samples of the variant's reference from the same rows; None if the variant is one.

        Raises:
            NotFinite: the variant's images are not finite.
        """
        variant, batch = self._with_state(variant), make_samples(np.arange(rows.start, rows.stop), self.spec)
        before = {} if reference is None else {variant.reference: torch.tensor(reference)}
        columns, samples = self.sampler.measure(batch, [variant], before)
        if reference is not None:
            return columns, None
        if variant.name == FULL and self.sampler.has_noise_floor:
            columns |= self.sampler.measure_other_noise(batch["index"], variant)
        return columns, samples[variant.name].cpu().numpy()

    def _with_state(self, variant: Variant) -> Variant:
        """Return this worker's copy of the variant, with the modules that it has built.

        References stay; of the others only the last one does, so that memory does not grow.
        """
        if variant.name not in self._variants:
            self._variants = {name: one for name, one in self._variants.items() if name == one.reference}
            self._variants[variant.name] = variant
        return self._variants[variant.name]


@dataclass(frozen=True)
class _Samples:
    """The accumulated metrics of a variant by name, and where its samples are.

    There is one Ray object of samples for each block of rows.
    """

    accumulators: dict[str, MetricAccumulator]
    blocks: list[Any]


class Bench:
    """The workers of a comparison, started when the first variant is measured."""

    def __init__(self, config: WorkflowConfig, spec: SampleSpec, references: list[Variant]) -> None:
        """Start no worker yet.

        Args:
            config: its `evaluate.samples` is the number of images.
            references: the variants that other variants are compared with.
        """
        self.config, self.spec = config, spec
        self.references = {variant.name: variant for variant in references}
        self._samples: dict[str, _Samples | Exception] = {}

    def __enter__(self) -> "Bench":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.__dict__.get("_workers", ()):  # where any were needed
            ray.kill(worker)

    def quality_of(self, reference: str) -> dict[str, Any]:
        """Return a reference's metrics, JSON-ready.

        With features they include `noise_floor`: see `evaluation.quality.evaluate_images`.
        """
        accumulators = self._reference_samples(reference).accumulators
        quality = self._quality(accumulators[reference], None)
        if NOISE_FLOOR in accumulators:
            with few_threads(self.config):
                quality[NOISE_FLOOR] = distances_to_full(
                    accumulators[NOISE_FLOOR], accumulators[reference], self._resamples
                )
        return quality

    def _quality(self, accumulators: MetricAccumulator, full: MetricAccumulator | None) -> dict[str, Any]:
        """Return a variant's metrics by name, JSON-ready."""
        real, resamples = self._real, self._resamples
        with few_threads(self.config):
            return variant_metrics(accumulators, full, real, resamples, real_name(self.config))

    def measure(self, variant: Variant) -> tuple[dict[str, Any], float]:
        """Return a variant's speedup and metrics, JSON-ready, and its times' spread.

        Raises:
            Exception: whatever the variant or its reference raises, or `NotMeasuredError`.
        """
        reference = self._reference_samples(variant.reference)
        speed, spread = ray.get(self._workers[0].times.remote(self.references[variant.reference], variant))
        accumulators = self._measure_images(variant, reference.blocks).accumulators
        quality = self._quality(accumulators[variant.name], reference.accumulators[variant.reference])
        for name, value in quality.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise NotMeasuredError(f"its {name} is {value}")
        return {"speedup": speed} | quality, spread

    def _reference_samples(self, name: str) -> _Samples:
        """Return a reference's samples; one that failed once is not sampled again."""
        if name not in self._samples:
            try:
                self._samples[name] = self._measure_images(self.references[name], None)
            except Exception as error:
                self._samples[name] = error
        found = self._samples[name]
        if isinstance(found, Exception):
            raise NotMeasuredError(f"its reference, {name}: {reason_of(found)}") from found
        return found

    def _measure_images(self, variant: Variant, blocks: list[Any] | None) -> _Samples:
        """Sample and measure a variant's images; `blocks` are its reference's samples."""
        samples, size = self.config.evaluate.samples, self.config.evaluate.batch_size
        ranges = [range(i, min(i + size, samples)) for i in range(0, samples, size)]
        workers, tasks = self._workers, []
        for i, rows in enumerate(ranges):
            worker = workers[i % len(workers)]
            arguments = (variant, rows, blocks[i] if blocks else None)
            tasks.append(worker.measure.options(num_returns=2).remote(*arguments))
        accumulators: dict[str, MetricAccumulator] = {}
        try:
            for columns, _ in tasks:
                accumulate(accumulators, [variant], ray.get(columns), samples)
        except Exception:
            # The workers have to be idle when the next variant is timed.
            ray.wait([columns for columns, _ in tasks], num_returns=len(tasks))
            raise
        return _Samples(accumulators, [block for _, block in tasks])

    @cached_property
    def _workers(self) -> list[Any]:
        """Start as many workers as fit.

        Once the first one is up, the others are given `_PATIENCE_S`.
        """
        _ = self._real  # before workers have the GPUs: it may take one
        settings = self.config.evaluate
        kind: Any = ray.remote(
            num_cpus=1, num_gpus=int(settings.use_gpu), max_restarts=-1, max_task_retries=_RETRIES
        )(VariantWorker)
        workers: list[Any] = [kind.remote(self.config, self.spec) for _ in range(settings.num_actors)]
        started = {worker.started.remote(): worker for worker in workers}
        ray.wait([*started], num_returns=1)
        ready, waiting = ray.wait([*started], num_returns=len(started), timeout=_PATIENCE_S)
        for answer in waiting:
            ray.kill(started[answer])
        ray.get(ready)
        return [started[answer] for answer in ready]

    @cached_property
    def _real(self) -> ReferenceSet | None:
        return real_images(self.config)

    @cached_property
    def _resamples(self) -> Resamples:
        first = next(iter(self.references))
        return Resamples.of(
            self._reference_samples(first).accumulators[first],
            self.config.evaluate.resamples,
            self.config.seed,
        )


def reason_of(error: BaseException) -> str:
    """Return in one line why a variant was not measured.

    It is the error that the variant's worker raised.
    """
    cause = getattr(error, "cause", None) or error
    message = " ".join(str(cause).split())
    if isinstance(cause, NotMeasuredError):
        return message
    if len(message) > _LONGEST:
        message = f"{message[:_LONGEST]} ..."
    return f"{type(cause).__name__}: {message}" if message else type(cause).__name__
