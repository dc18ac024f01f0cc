"""Evaluate a router: sample the same noise full, cached and with fewer steps.

Fewer steps are as many as take the cached variant's measured time.

Latency is measured on one worker, on which the variants alternate; quality by `pipelines.evaluation.quality`.
"""

from collections.abc import Mapping
from typing import Any

import ray
from matplotlib.figure import Figure

from harmonica.core.artifact import RouterArtifact
from harmonica.evaluation.differences import with_differences
from harmonica.evaluation.evaluation_report import (
    CACHED,
    FEWER,
    FULL,
    EvaluationReport,
    RouterSpeeds,
    VariantResult,
    estimates_from_json,
    family_variant,
)
from harmonica.evaluation.metric_table import FRECHET_TO_FULL, METRICS, PSNR_TO_FULL
from harmonica.evaluation.plots import cached_title, router_heat_map, sample_sheet

from ..config.workflow import TrainConfig, WorkflowConfig
from ..runtime.ray_runtime import plainly
from .latency import Timing, device_of, measure
from .open_model import open_model
from .quality import NOISE_FLOOR, evaluate_images
from .variants import Variant, make_family_variants, make_transfer_variants, make_variants


@plainly()
def evaluate(
    config: WorkflowConfig, artifact: RouterArtifact, family: Mapping[str, RouterArtifact] | None = None
) -> tuple[EvaluationReport, dict[str, Figure]]:
    """Return the report of one router, and its figures by file name.

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
    members = {family_variant(name): member for name, member in family.items()}
    results = {one.name: _result(one, timing, quality[one.name], members.get(one.name)) for one in variants}
    is_worth, verdict = worth_having(results, config.train)
    report = EvaluationReport(
        variants=results,
        speeds=_speeds(artifact, timing.speedup(CACHED)),
        samples=settings.samples,
        reuse=artifact.reuse,
        noise_floor=_of_metrics(noise_floor) if noise_floor else None,
        transfer={variant.name: _of_metrics(quality[variant.name]) for variant in transfer},
        worth_having=is_worth,
        verdict=verdict,
    )
    return report, _pictures(config, artifact, family, timing)


def _speeds(artifact: RouterArtifact, measured: float) -> RouterSpeeds:
    return RouterSpeeds.of(artifact.method, artifact.plan.cur, artifact.ideal_speedup, measured)


def _of_metrics(quality: Mapping[str, Any]) -> VariantResult:
    return VariantResult(metrics=estimates_from_json(quality))


def _result(
    variant: Variant, timing: Timing, quality: Mapping[str, Any], member: RouterArtifact | None
) -> VariantResult:
    """Return a variant's result.

    It has the speeds of its router if it is a family's member.
    """
    speedup = timing.speedup(variant.name)
    return VariantResult(
        num_inference_steps=variant.num_inference_steps,
        seconds_per_image=timing.seconds_per_image[variant.name],
        seconds_spread=timing.spread[variant.name],
        speedup=speedup,
        metrics=estimates_from_json(quality),
        router=_speeds(member, speedup) if member is not None else None,
    )


@plainly()
def with_sample(config: WorkflowConfig, artifact: RouterArtifact) -> RouterArtifact:
    """Return the artifact with its golden sample, which a worker makes.

    Raises:
        NotFinite: the sample is not finite.
    """

    def record() -> RouterArtifact:
        return open_model(config, device_of(config.evaluate.use_gpu)).record_sample(artifact)

    return ray.get(ray.remote(num_cpus=1, num_gpus=int(config.evaluate.use_gpu))(record).remote())


def _pictures(
    config: WorkflowConfig, artifact: RouterArtifact, family: Mapping[str, RouterArtifact], timing: Timing
) -> dict[str, Figure]:
    """Return the sheet of samples and the heat map of the router.

    The sheet shows the differences too.
    """
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
    if next(iter(rows.values())).shape[1] in (1, 3):  # the samples are pixels; latents would need their VAE
        title = "Same noise, full and cached"
        pictures["samples.png"] = sample_sheet(with_differences(rows), timing.sheet_names, title=title)
    return pictures


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


def worth_having(variants: Mapping[str, VariantResult], train: TrainConfig) -> tuple[bool, str]:
    """Return whether the router beats fewer steps at equal time, and why.

    Nearer to the full images is better.

    Args:
        train: how it was trained.
    """
    cached, fewer = variants[CACHED], variants[FEWER]
    nearer = {"PSNR": METRICS[PSNR_TO_FULL].is_better(cached.psnr_to_full, fewer.psnr_to_full)}
    if cached.frechet_to_full is not None and fewer.frechet_to_full is not None:
        frechet = METRICS[FRECHET_TO_FULL]
        nearer["Frechet distance"] = frechet.is_better(cached.frechet_to_full, fewer.frechet_to_full)
    baseline = f"sampling in {fewer.num_inference_steps} steps at the same measured time"
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
    return not lost, message
