"""Speed and quality of one arm after another, on workers that keep the model and what references have drawn.

So an arm's result is there as soon as it is measured, and one that fails takes no other with it.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

import numpy as np
import ray
import torch

from harmonica.data.batch import Batch, RowSpec, make_rows
from harmonica.evaluation.accumulators import ArmStatistics
from harmonica.evaluation.reference_sets import ReferenceSet
from harmonica.evaluation.report import Resamples, arm_quality, distances_to_full
from pipelines.config.workflow import WorkflowConfig
from pipelines.evaluation.latency import FULL, Arm, median_times
from pipelines.evaluation.quality import NOISE_FLOOR, ArmSampler, few_threads, keep, real_images, real_name
from pipelines.runtime.ray_runtime import quiet_libraries

_RETRIES = 2
"""Of a task whose worker is lost; an arm that takes its worker down every time is not measured."""
_PATIENCE_S = 60.0
_LONGEST = 300
Columns = dict[str, np.ndarray]


class NotMeasuredError(Exception):
    """An arm that cannot be measured; says why."""


class ArmWorker:
    """A Ray actor: one model and all that looks at images."""

    def __init__(self, config: WorkflowConfig, spec: RowSpec) -> None:
        quiet_libraries()
        self.settings, self.spec = config.evaluate, spec
        self.sampler = ArmSampler(config, spec, [])
        self._arms: dict[str, Arm] = {}

    def begun(self) -> None:
        """Answers once the worker has a place and its model."""

    def times(self, reference: Arm, arm: Arm) -> tuple[float, float]:
        """How many times as fast as its reference, timed in turn with it; and the spread of the times."""
        indices = np.arange(self.settings.timing_batch_size)
        batch = Batch.of(make_rows(indices, self.spec), self.spec, self.sampler.device)
        pair, rounds = [self._kept(reference), self._kept(arm)], self.settings.timing_rounds
        seconds, spread = median_times(pair, self.sampler.model, batch, rounds)
        return seconds[reference.name] / seconds[arm.name], max(spread.values())

    def look(self, arm: Arm, rows: range, reference: np.ndarray | None) -> tuple[Columns, np.ndarray | None]:
        """The arm's columns on these rows, and, where it is a reference, what it has drawn.

        Args:
            reference: what the arm's reference has drawn from them; None where it is that arm.

        Raises:
            NotFinite: it draws what is not finite.
        """
        arm, batch = self._kept(arm), make_rows(np.arange(rows.start, rows.stop), self.spec)
        before = {} if reference is None else {arm.reference: torch.tensor(reference)}
        columns, drawn = self.sampler.look(batch, [arm], before)
        if reference is not None:
            return columns, None
        if arm.name == FULL and self.sampler.has_noise_floor:
            columns |= self.sampler.other_noise(batch["index"], arm)
        return columns, drawn[arm.name].cpu().numpy()

    def _kept(self, arm: Arm) -> Arm:
        """The arm as it was here before, with what it has built; of those beside references only the last."""
        if arm.name not in self._arms:
            self._arms = {name: one for name, one in self._arms.items() if name == one.reference}
            self._arms[arm.name] = arm
        return self._arms[arm.name]


@dataclass(frozen=True)
class _Drawn:
    """Of a reference: what is kept of its images, and block by block the images themselves."""

    kept: dict[str, ArmStatistics]
    blocks: list[Any]


class Bench:
    """The workers of a comparison; they start with the first arm that is measured."""

    def __init__(self, config: WorkflowConfig, spec: RowSpec, references: list[Arm]) -> None:
        """
        Args:
            config: its `evaluate.samples` is the number of images.
            references: those that arms name, and are held against.
        """
        self.config, self.spec = config, spec
        self.references = {arm.name: arm for arm in references}
        self._drawn: dict[str, _Drawn | Exception] = {}

    def __enter__(self) -> "Bench":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.__dict__.get("_workers", ()):  # where any were needed
            ray.kill(worker)

    def quality_of(self, reference: str) -> dict[str, Any]:
        """Of a reference, JSON-ready; with features also `noise_floor`, see `evaluation.quality.judge`."""
        kept = self._draw(reference).kept
        quality = self._quality(kept[reference], None)
        if NOISE_FLOOR in kept:
            with few_threads(self.config):
                quality[NOISE_FLOOR] = distances_to_full(kept[NOISE_FLOOR], kept[reference], self._resamples)
        return quality

    def _quality(self, kept: ArmStatistics, full: ArmStatistics | None) -> dict[str, Any]:
        real, resamples = self._real, self._resamples
        with few_threads(self.config):
            return arm_quality(kept, full, real, resamples, real_name(self.config))

    def measure(self, arm: Arm) -> tuple[dict[str, Any], float]:
        """Speed and quality of an arm, JSON-ready, and the spread of the times.

        Raises:
            Exception: whatever the arm or its reference raises, or `NotMeasuredError`.
        """
        reference = self._draw(arm.reference)
        speed, spread = ray.get(self._workers[0].times.remote(self.references[arm.reference], arm))
        kept = self._look(arm, reference.blocks).kept
        quality = self._quality(kept[arm.name], reference.kept[arm.reference])
        for name, value in quality.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise NotMeasuredError(f"its {name} is {value}")
        return {"speedup": speed} | quality, spread

    def _draw(self, name: str) -> _Drawn:
        """What a reference draws; one that fails is not tried for every arm that names it."""
        if name not in self._drawn:
            try:
                self._drawn[name] = self._look(self.references[name], None)
            except Exception as error:
                self._drawn[name] = error
        drawn = self._drawn[name]
        if isinstance(drawn, Exception):
            raise NotMeasuredError(f"its reference, {name}: {reason_of(drawn)}") from drawn
        return drawn

    def _look(self, arm: Arm, blocks: list[Any] | None) -> _Drawn:
        """All images of an arm; `blocks` are its reference's."""
        samples, size = self.config.evaluate.samples, self.config.evaluate.batch_size
        ranges = [range(i, min(i + size, samples)) for i in range(0, samples, size)]
        workers, tasks = self._workers, []
        for i, rows in enumerate(ranges):
            worker = workers[i % len(workers)]
            asked = (arm, rows, blocks[i] if blocks else None)
            tasks.append(worker.look.options(num_returns=2).remote(*asked))
        kept: dict[str, ArmStatistics] = {}
        try:
            for columns, _ in tasks:
                keep(kept, [arm], ray.get(columns), samples)
        except Exception:
            # So that the workers are idle when the next arm is timed.
            ray.wait([columns for columns, _ in tasks], num_returns=len(tasks))
            raise
        return _Drawn(kept, [drawn for _, drawn in tasks])

    @cached_property
    def _workers(self) -> list[Any]:
        """As many as there is room for; none waits for longer than `_PATIENCE_S` once the first has begun."""
        _ = self._real  # before workers have the GPUs: it may take one
        settings = self.config.evaluate
        kind: Any = ray.remote(
            num_cpus=1, num_gpus=int(settings.use_gpu), max_restarts=-1, max_task_retries=_RETRIES
        )(ArmWorker)
        workers: list[Any] = [kind.remote(self.config, self.spec) for _ in range(settings.num_actors)]
        begun = {worker.begun.remote(): worker for worker in workers}
        ray.wait([*begun], num_returns=1)
        ready, waiting = ray.wait([*begun], num_returns=len(begun), timeout=_PATIENCE_S)
        for answer in waiting:
            ray.kill(begun[answer])
        ray.get(ready)
        return [begun[answer] for answer in ready]

    @cached_property
    def _real(self) -> ReferenceSet | None:
        return real_images(self.config)

    @cached_property
    def _resamples(self) -> Resamples:
        first = next(iter(self.references))
        return Resamples.of(self._draw(first).kept[first], self.config.evaluate.resamples, self.config.seed)


def reason_of(error: BaseException) -> str:
    """Why an arm was not measured: the error that a worker raised, in one line."""
    cause = getattr(error, "cause", None) or error
    words = " ".join(str(cause).split())
    if isinstance(cause, NotMeasuredError):
        return words
    if len(words) > _LONGEST:
        words = f"{words[:_LONGEST]} ..."
    return f"{type(cause).__name__}: {words}" if words else type(cause).__name__
