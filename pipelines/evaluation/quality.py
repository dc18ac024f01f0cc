"""Quality of arms: each samples the same rows, and what judging needs comes back, not the images.

A pool of actors samples over a Ray Data stream, so 50,000 samples are the same code.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from harmonica.data.batch import Batch, RowSpec, Share, make_rows
from harmonica.evaluation.accumulators import ArmStatistics
from harmonica.evaluation.reference_sets import ReferenceSet
from harmonica.evaluation.report import Resamples, arm_quality, distances_to_full
from harmonica.models.loading import load_model
from harmonica.pretraining import captions
from harmonica.validation.finite import check_finite
from pipelines.config.workflow import EvaluateConfig, WorkflowConfig
from pipelines.data.stream import stream_rows
from pipelines.evaluation.latency import Arm, device_of
from pipelines.evaluation.metric_networks import Judges, feature_kind, read_reference
from pipelines.runtime.ray_runtime import quiet_libraries

NOISE_FLOOR = "noise_floor"
_OTHER_SEED = 1  # from the evaluation's: rows that neither training nor any arm has seen


def judge(config: WorkflowConfig, spec: RowSpec, arms: list[Arm]) -> dict[str, dict[str, Any]]:
    """Quality of each arm by its name, JSON-ready; `config.evaluate.samples` images of each, same noise.

    The reference of the first arm also has `noise_floor`: the distances of its images to those that it
    draws from another seed.

    Args:
        arms: any number, each after the arm that it names as its reference.

    Raises:
        ValueError: an arm whose reference does not stand before it, or two of one name.
    """
    _check(arms)
    # By a worker beside this process: who makes a stream's actors has Ray's remark on its own screen.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    judged = ray.remote(num_cpus=0)(_judged_by_worker).options(scheduling_strategy=here)
    kept = ray.get(judged.remote(config, spec, arms))
    with few_threads(config):
        return _quality(config, arms, kept)


@contextmanager
def few_threads(config: WorkflowConfig) -> Iterator[None]:
    """One thread for statistics of a classifier's features: more gain nothing on so few, and wait for each
    other where cores are busy."""
    threads = torch.get_num_threads()
    if feature_kind(config.evaluate, config.model) == "classifier":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def real_name(config: WorkflowConfig) -> str:
    """What distances to the real images are called after."""
    return "reference" if config.evaluate.features == "inception" else "test"


def _quality(
    config: WorkflowConfig, arms: list[Arm], kept: dict[str, ArmStatistics]
) -> dict[str, dict[str, Any]]:
    real = real_images(config)
    resamples = Resamples.of(kept[arms[0].name], config.evaluate.resamples, config.seed)
    quality = {}
    for arm in arms:
        full = None if arm.name == arm.reference else kept[arm.reference]
        quality[arm.name] = arm_quality(kept[arm.name], full, real, resamples, real_name(config))
    if NOISE_FLOOR in kept:
        first = arms[0].reference
        quality[first][NOISE_FLOOR] = distances_to_full(kept[NOISE_FLOOR], kept[first], resamples)
    return quality


def _check(arms: list[Arm]) -> None:
    names: list[str] = []
    for arm in arms:
        if arm.name in (*names, NOISE_FLOOR):
            raise ValueError(
                f"two arms are named {arm.name!r}: give each its own name, and none {NOISE_FLOOR!r}"
            )
        names.append(arm.name)
        if arm.reference not in names:
            raise ValueError(f"arm {arm.name!r} comes before its reference {arm.reference!r}: put it after")


class ArmSampler:
    """A Ray Data actor: samples every arm from the same rows and hands back what judging needs."""

    def __init__(self, config: WorkflowConfig, spec: RowSpec, arms: list[Arm]) -> None:
        self.arms, self.spec = arms, spec
        self.device = device_of(config.evaluate.use_gpu)
        loaded = load_model(config.model, self.device)
        self.model = loaded.model
        self.judges = Judges(config, loaded, self.device)
        self.has_noise_floor = config.evaluate.noise_floor and self.judges.extractor is not None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        out, _ = self.look(batch, self.arms, {})
        if self.has_noise_floor:
            out |= self.other_noise(batch["index"], self.arms[0])  # the first one is its own reference
        return out

    def look(
        self, batch: dict[str, np.ndarray], arms: list[Arm], drawn: Mapping[str, Tensor]
    ) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
        """Columns of each arm on these rows, and what it has drawn.

        Args:
            drawn: what references that are not among the arms drew from the same rows.

        Raises:
            NotFinite: an arm draws what is not finite.
        """
        rows, drawn = Batch.of(batch, self.spec, self.device), dict(drawn)
        images = {name: self.judges.shown(samples) for name, samples in drawn.items()}
        prompts = self._prompts(batch["label"])
        out = {"index": batch["index"], "label": self._classes(batch["label"], prompts)}
        for arm in arms:
            drawn[arm.name] = samples = arm.sample(self.model, rows)
            images[arm.name] = ours = self.judges.shown(samples)
            check_finite(ours, f"images of arm {arm.name!r} are")
            columns = self.judges.features(ours) | self.judges.fidelity(ours, prompts)
            if arm.name != arm.reference:
                columns |= self.judges.nearness(ours, images[arm.reference])
            out |= {f"{arm.name}.{name}": column for name, column in columns.items()}
        return out, {arm.name: drawn[arm.name] for arm in arms}

    def other_noise(self, index: np.ndarray, reference: Arm) -> dict[str, np.ndarray]:
        """Features of what a reference draws from the same rows of another seed."""
        other = replace(self.spec, seed=self.spec.seed + _OTHER_SEED)
        drawn = reference.sample(self.model, Batch.of(make_rows(index, other), other, self.device))
        shown = self.judges.shown(drawn)
        check_finite(shown, f"images of arm {reference.name!r} are")
        columns = self.judges.features(shown)
        return {f"{NOISE_FLOOR}.{name}": column for name, column in columns.items()}

    def _prompts(self, labels: np.ndarray) -> list[str] | None:
        """What was asked for in words, where somebody reads it."""
        read = self.judges.is_classifier or self.judges.clip is not None
        return self.spec.prompts.rows(labels).prompts if self.spec.prompts and read else None

    def _classes(self, labels: np.ndarray, prompts: list[str] | None) -> np.ndarray:
        """What a classifier should see: of prompts, the class that they ask for, or -1 where nobody knows."""
        if self.spec.prompts is None:
            return labels
        known, texts = set(captions.all_captions()), [prompt.lower() for prompt in prompts or []]
        meant = [captions.meaning(text)[0] if text in known else -1 for text in texts]
        return np.array(meant or [-1] * len(labels))


def _judged_by_worker(config: WorkflowConfig, spec: RowSpec, arms: list[Arm]) -> dict[str, ArmStatistics]:
    quiet_libraries()
    ray.data.DataContext.get_current().enable_progress_bars = False
    return _collect(config, arms, _judged(config, spec, arms))


def _judged(config: WorkflowConfig, spec: RowSpec, arms: list[Arm]) -> Iterator[dict[str, np.ndarray]]:
    """Batches of per-image numbers and features of every arm."""
    settings: EvaluateConfig = config.evaluate
    # A block a batch: with fewer blocks than actors some would idle.
    rows = stream_rows(
        spec, Share(batch_size=1), trajectories=settings.samples, rows_per_block=settings.batch_size
    )
    judged = rows.map_batches(
        ArmSampler,
        fn_constructor_kwargs={"config": config, "spec": spec, "arms": arms},
        compute=ActorPoolStrategy(size=settings.num_actors),
        batch_size=settings.batch_size,
        num_cpus=1,
        num_gpus=1 if settings.use_gpu else None,
    )
    yield from judged.iter_batches(batch_size=None, batch_format="numpy")


def _collect(
    config: WorkflowConfig, arms: list[Arm], batches: Iterator[dict[str, np.ndarray]]
) -> dict[str, ArmStatistics]:
    """What is kept of every arm, by its name; batches are let go one by one."""
    kept: dict[str, ArmStatistics] = {}
    for batch in batches:
        keep(kept, arms, batch, config.evaluate.samples)
    return kept


def keep(kept: dict[str, ArmStatistics], arms: list[Arm], batch: dict[str, np.ndarray], count: int) -> None:
    """Add a batch of columns to what is kept of each arm, of `count` images in all."""
    index, label = batch.pop("index"), batch.pop("label")
    columns = {arm.name: {"label": label} for arm in arms}
    for name, column in batch.items():
        arm_name, kind = name.rsplit(".", 1)
        columns.setdefault(arm_name, {})[kind] = column
    for arm_name, values in columns.items():
        kept.setdefault(arm_name, ArmStatistics(count)).add(index, values)


def real_images(config: WorkflowConfig) -> ReferenceSet | None:
    """Real images, seen on a worker where that takes a network."""
    if feature_kind(config.evaluate, config.model) != "inception":
        return read_reference(config, device_of(False))
    use_gpu = config.evaluate.use_gpu
    remote = ray.remote(num_cpus=1, num_gpus=int(use_gpu))(read_reference)
    return ray.get(remote.remote(config, device_of(use_gpu)))
