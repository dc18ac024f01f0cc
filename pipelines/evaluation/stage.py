"""Evaluate a router: the same noise sampled full, cached, and with fewer steps at equal measured time.

Latency is measured on one worker, on which the variants alternate; quality by `pipelines.evaluation.quality`.
"""

from collections.abc import Mapping
from typing import Any

import ray
from matplotlib.figure import Figure

from harmonica.core.artifact import RouterArtifact
from harmonica.core.golden_sample import record_sample
from harmonica.evaluation.differences import with_differences
from harmonica.evaluation.evaluation_report import CACHED, FEWER, FULL, family_variant
from harmonica.evaluation.plots import cached_title, router_heat_map, sample_sheet
from harmonica.models.loading import load_model
from harmonica.samplers import make_sampler

from ..config.workflow import TrainConfig, WorkflowConfig
from ..runtime.ray_runtime import plainly
from .latency import (
    Timing,
    Variant,
    device_of,
    make_family_variants,
    make_transfer_variants,
    make_variants,
    measure,
)
from .quality import NOISE_FLOOR, evaluate_images


@plainly()
def evaluate(
    config: WorkflowConfig, artifact: RouterArtifact, family: Mapping[str, RouterArtifact] | None = None
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Return the report of one router, JSON-ready, and its figures by file name.

    Args:
        family: routers for other speeds, by name; each gets a variant on the same noise.

    Raises:
        NotFinite: a variant's images are not finite.
    """
    family = family or {}
    settings = config.evaluate
    remote = ray.remote(num_cpus=1, num_gpus=int(settings.use_gpu))(measure)
    timing: Timing = ray.get(remote.remote(config, artifact, family))
    variants = make_variants(config, artifact, timing.fewer_steps) + make_family_variants(config, family)
    transfer = make_transfer_variants(config, artifact)
    quality = evaluate_images(config, timing.rows, variants + transfer)
    noise_floor = quality[FULL].pop(NOISE_FLOOR, None)
    report_variants = {variant.name: _times(variant, timing) | quality[variant.name] for variant in variants}
    for name, member in family.items():
        variant = report_variants[family_variant(name)]
        report_variants[family_variant(name)] = variant | _speeds(member, variant["speedup"])
    report = {
        "samples": settings.samples,
        "reuse": artifact.reuse,
        **_speeds(artifact, report_variants[CACHED]["speedup"]),
        "arms": report_variants,
    }
    if noise_floor:
        report[NOISE_FLOOR] = noise_floor
    if transfer:
        report["transfer"] = {variant.name: quality[variant.name] for variant in transfer}
    return report | worth_having(report_variants, config.train), _pictures(config, artifact, family, timing)


def _speeds(artifact: RouterArtifact, measured: float) -> dict[str, Any]:
    """Return how much a router reuses, and its speedups in MACs and in measured time."""
    ideal = artifact.ideal_speedup
    return {
        "method": artifact.method,
        "cur": artifact.plan.cur,
        "ideal_speedup": ideal,
        "measured_speedup": measured,
        "realised_share": (1 - 1 / measured) / (1 - 1 / ideal) if ideal > 1 else None,
    }


def member_report(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the report of a family's member, as if it had been evaluated alone."""
    variant = report["arms"][family_variant(name)]
    about = ("method", "cur", "ideal_speedup", "measured_speedup", "realised_share")
    quality = {key: value for key, value in variant.items() if key not in about}
    return {"samples": report["samples"]} | {key: variant[key] for key in about} | {"arms": {CACHED: quality}}


@plainly()
def with_sample(config: WorkflowConfig, artifact: RouterArtifact) -> RouterArtifact:
    """Return the artifact with its golden sample, drawn on a worker.

    Raises:
        NotFinite: the sample is not finite.
    """

    def record() -> RouterArtifact:
        model = load_model(config.model, device_of(config.evaluate.use_gpu)).model
        return record_sample(artifact, make_sampler(model, artifact.sampler))

    return ray.get(ray.remote(num_cpus=1, num_gpus=int(config.evaluate.use_gpu))(record).remote())


def _pictures(
    config: WorkflowConfig, artifact: RouterArtifact, family: Mapping[str, RouterArtifact], timing: Timing
) -> dict[str, Figure]:
    """Return the sheet of samples, with their differences, and the heat map of the router."""
    cached = {CACHED: artifact} | {family_variant(name): one for name, one in family.items()}
    titles = {
        FULL: f"full, {config.sampler.num_inference_steps} steps",
        FEWER: f"{timing.fewer_steps} steps",
    } | {name: cached_title(name, one.plan.cur, one.method) for name, one in cached.items()}
    rows = {titles[name]: images for name, images in timing.sheet.items()}
    pictures = {
        "router.png": router_heat_map(
            artifact.logits_TB.sigmoid(), artifact.plan.to_tensor(), timing.branch_names
        )
    }
    if next(iter(rows.values())).shape[1] in (1, 3):  # pixels; latents want their VAE
        title = "Same noise, full and cached"
        pictures["samples.png"] = sample_sheet(with_differences(rows), timing.sheet_names, title=title)
    return pictures


def _times(variant: Variant, timing: Timing) -> dict[str, Any]:
    return {
        "num_inference_steps": variant.num_inference_steps,
        "seconds_per_image": timing.seconds_per_image[variant.name],
        "seconds_spread": timing.spread[variant.name],
        "speedup": timing.seconds_per_image[FULL] / timing.seconds_per_image[variant.name],
    }


def advice(train: TrainConfig) -> str:
    """Return which setting to change, and which way, if a router is not worth having."""
    turned = {
        "target_speedup": "ask for less speed",
        "target_cur": "reuse less",
        "target_psnr": "ask for nearer images",
    }
    longer = "Train longer (train.trajectories)"
    for name, message in turned.items():
        if value := getattr(train, name):
            return f"{longer}, or {message} (train.{name}, which is {value:g})."
    return f"{longer}, or weigh reuse less (train.sdt.beta, which is {train.sdt.beta:g})."


def worth_having(variants: dict[str, dict[str, Any]], train: TrainConfig) -> dict[str, Any]:
    """Return whether the router's images are nearer to full than those of fewer steps at equal time.

    Args:
        train: how it was trained.
    """
    cached, fewer = variants[CACHED], variants[FEWER]
    nearer = {"PSNR": cached["psnr_to_full"] > fewer["psnr_to_full"]}
    if "frechet_to_full" in cached:
        nearer["Frechet distance"] = cached["frechet_to_full"] < fewer["frechet_to_full"]
    baseline = f"sampling in {fewer['num_inference_steps']} steps at the same measured time"
    won, lost = [n for n, ok in nearer.items() if ok], [n for n, ok in nearer.items() if not ok]
    if not lost:
        message = (
            f"Worth having: nearer to the full sampler's images than {baseline}, by {' and '.join(won)}."
        )
    else:
        message = (
            f"Not worth having as trained: {baseline} is nearer to the full sampler's images by "
            f"{' and '.join(lost)}. {advice(train)}"
        )
    return {"worth_having": not lost, "verdict": message}
