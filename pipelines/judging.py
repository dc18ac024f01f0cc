"""Quality of arms: each samples the same rows, and what judging needs comes back, not the images.

A pool of actors samples over a Ray Data stream, so 50,000 samples are the same code.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from ray.data import ActorPoolStrategy

from harmonica import captions
from harmonica.classifier import (
    BUILTIN_FOLDER,
    STATISTICS_FILE,
    FeatureStatistics,
    features_and_logits,
    load_classifier,
)
from harmonica.models.loading import BUILTIN, BUILTIN_TEXT, ModelConfig, load_model
from harmonica.rows import Batch, RowSpec, Share
from pipelines.config import EvaluateConfig, WorkflowConfig
from pipelines.stream import stream_rows
from pipelines.timing import Arm, device_of


def judge(config: WorkflowConfig, spec: RowSpec, arms: list[Arm]) -> dict[str, dict[str, Any]]:
    """Quality of each arm by its name, JSON-ready; `config.evaluate.samples` images of each, same noise.

    Args:
        arms: any number, each after the arm that it names as its reference.
    """
    knows = _can_be_judged(config.model)
    columns = _collect(_judged(config, spec, arms, knows))
    return {arm.name: _quality(arm, columns, knows) for arm in arms}


class ArmSampler:
    """A Ray Data actor: samples every arm from the same rows and hands back what judging needs."""

    def __init__(self, config: WorkflowConfig, spec: RowSpec, arms: list[Arm], judge: bool) -> None:
        self.arms, self.spec = arms, spec
        self.device = device_of(config.evaluate.use_gpu)
        self.model = load_model(config.model, self.device).model
        self.classifier = load_classifier() if judge else None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        from harmonica.metrics import psnr  # seconds to import, so only where images are judged

        rows = Batch.of(batch, self.spec, self.device)
        out, images = {"label": self._classes(batch["label"])}, {}
        for arm in self.arms:
            images[arm.name] = ours = arm.sample(self.model, rows).cpu()
            out[f"{arm.name}.psnr"] = psnr(ours, images[arm.reference]).clamp(max=100).numpy()
            if self.classifier is not None:
                features, logits = features_and_logits(self.classifier, ours)
                out[f"{arm.name}.features"] = features.numpy()
                out[f"{arm.name}.class"] = logits.argmax(1).numpy()
        return out

    def _classes(self, labels: np.ndarray) -> np.ndarray:
        """What a classifier should see: of prompts, the class that they ask for, or -1 where nobody knows."""
        if self.spec.prompts is None or self.classifier is None:
            return labels
        known = set(captions.all_captions())
        prompts = (prompt.lower() for prompt in self.spec.prompts.rows(labels).prompts)
        return np.array([captions.meaning(prompt)[0] if prompt in known else -1 for prompt in prompts])


def _judged(
    config: WorkflowConfig, spec: RowSpec, arms: list[Arm], judge: bool
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of per-image numbers of every arm."""
    settings: EvaluateConfig = config.evaluate
    # A block a batch: with fewer blocks than actors some would idle.
    rows = stream_rows(
        spec, Share(batch_size=1), trajectories=settings.samples, rows_per_block=settings.batch_size
    )
    judged = rows.map_batches(
        ArmSampler,
        fn_constructor_kwargs={"config": config, "spec": spec, "arms": arms, "judge": judge},
        compute=ActorPoolStrategy(size=settings.num_actors),
        batch_size=settings.batch_size,
        num_cpus=1,
        num_gpus=1 if settings.use_gpu else None,
    )
    yield from judged.iter_batches(batch_size=None, batch_format="numpy")


def _can_be_judged(model: ModelConfig) -> bool:
    """The shipped classifier knows the built-in model's images only."""
    return model.path in (BUILTIN, BUILTIN_TEXT)


def _collect(batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    kept = list(batches)
    return {name: np.concatenate([batch[name] for batch in kept]) for name in kept[0]}


def _quality(arm: Arm, columns: dict[str, np.ndarray], judge: bool) -> dict[str, Any]:
    """How good an arm's images are, and how near to those of its reference."""
    from harmonica.metrics import frechet_distance

    def statistics_of(name: str) -> FeatureStatistics:
        return FeatureStatistics.from_features(torch.from_numpy(columns[f"{name}.features"].copy()))

    report: dict[str, Any] = {}
    is_reference = arm.name == arm.reference
    if not is_reference:
        report["psnr_to_full"] = float(columns[f"{arm.name}.psnr"].mean())
    if judge:
        ours, classes = statistics_of(arm.name), columns[f"{arm.name}.class"]
        test = FeatureStatistics.load(BUILTIN_FOLDER / STATISTICS_FILE)
        report["frechet_to_test"] = frechet_distance(ours, test)
        known = columns["label"] >= 0
        if known.any():
            report["label_accuracy"] = float((classes == columns["label"])[known].mean())
        if not is_reference:
            report["frechet_to_full"] = frechet_distance(ours, statistics_of(arm.reference))
            report["label_agreement"] = float((classes == columns[f"{arm.reference}.class"]).mean())
    return report
