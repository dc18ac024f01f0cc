"""Judge a router: the same noise sampled full, cached, and with fewer steps at equal measured time.

Speed is measured arm beside arm on one worker; images are sampled by a pool of actors over a Ray Data
stream, which hand back numbers, not images, so 50,000 samples are the same code.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch
from matplotlib.figure import Figure
from ray.data import ActorPoolStrategy

from harmonica import captions
from harmonica.artifact import RouterArtifact
from harmonica.classifier import (
    BUILTIN_FOLDER,
    STATISTICS_FILE,
    FeatureStatistics,
    features_and_logits,
    load_classifier,
)
from harmonica.models.loading import BUILTIN, BUILTIN_TEXT, ModelConfig, load_model
from harmonica.pictures import router_heat_map, sample_sheet
from harmonica.rows import Batch, RowSpec, Share
from harmonica.samplers import make_sampler
from harmonica.smoke import record_sample
from pipelines.config import EvaluateConfig, WorkflowConfig
from pipelines.stream import stream_rows
from pipelines.timing import (
    CACHED,
    FEWER,
    FULL,
    Arm,
    Timing,
    device_of,
    make_arms,
    make_transfer_arms,
    measure,
)


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


def evaluate(config: WorkflowConfig, artifact: RouterArtifact) -> tuple[dict[str, Any], dict[str, Figure]]:
    """The report of one router, JSON-ready, and its pictures by file name."""
    settings = config.evaluate
    remote = ray.remote(num_cpus=1, num_gpus=int(settings.use_gpu))(measure)
    timing: Timing = ray.get(remote.remote(config, artifact))
    arms, transfer = make_arms(config, artifact, timing.fewer_steps), make_transfer_arms(config, artifact)
    judge = _can_be_judged(config.model)
    columns = _collect(_judged(config, timing.rows, arms + transfer, judge))
    report_arms = {arm.name: _times(arm, timing) | _quality(arm, columns, judge) for arm in arms}
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
    if transfer:
        report["transfer"] = {arm.name: _quality(arm, columns, judge) for arm in transfer}
    return report | verdict(report_arms), _pictures(config, artifact, timing)


def with_sample(config: WorkflowConfig, artifact: RouterArtifact) -> RouterArtifact:
    """The artifact with the sample that others hold it to, drawn on a worker."""

    def record() -> RouterArtifact:
        model = load_model(config.model, device_of(config.evaluate.use_gpu)).model
        return record_sample(artifact, make_sampler(model, artifact.sampler))

    return ray.get(ray.remote(num_cpus=1, num_gpus=int(config.evaluate.use_gpu))(record).remote())


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
        pictures["samples.png"] = sample_sheet(rows, timing.sheet_names, title="Same noise, full and cached")
    return pictures


def _collect(batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    kept = list(batches)
    return {name: np.concatenate([batch[name] for batch in kept]) for name in kept[0]}


def _times(arm: Arm, timing: Timing) -> dict[str, Any]:
    return {
        "num_inference_steps": arm.num_inference_steps,
        "seconds_per_image": timing.seconds_per_image[arm.name],
        "seconds_spread": timing.spread[arm.name],
        "speedup": timing.seconds_per_image[FULL] / timing.seconds_per_image[arm.name],
    }


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


def verdict(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Whether the router is worth having: nearer to the full images than fewer steps at equal time."""
    cached, fewer = arms[CACHED], arms[FEWER]
    nearer = {"PSNR": cached["psnr_to_full"] > fewer["psnr_to_full"]}
    if "frechet_to_full" in cached:
        nearer["Frechet distance"] = cached["frechet_to_full"] < fewer["frechet_to_full"]
    rival = f"sampling in {fewer['num_inference_steps']} steps at the same measured time"
    won, lost = [n for n, ok in nearer.items() if ok], [n for n, ok in nearer.items() if not ok]
    if not lost:
        words = f"Worth having: nearer to the full sampler's images than {rival}, by {' and '.join(won)}."
    else:
        words = (
            f"Not worth having as trained: {rival} is nearer to the full sampler's images by "
            f"{' and '.join(lost)}. Train longer (train.trajectories) or reuse less (train.target_cur)."
        )
    return {"worth_having": not lost, "verdict": words}
