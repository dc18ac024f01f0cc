"""Judge a router: the same noise sampled full, cached, and with fewer steps at equal measured time.

Speed is measured arm beside arm on one worker; quality by `pipelines.evaluation.quality`.
"""

from collections.abc import Mapping
from typing import Any

import ray
from matplotlib.figure import Figure

from harmonica.core.artifact import RouterArtifact
from harmonica.core.golden_sample import record_sample
from harmonica.evaluation.differences import with_differences
from harmonica.evaluation.plots import cached_title, router_heat_map, sample_sheet
from harmonica.models.loading import load_model
from harmonica.samplers import make_sampler
from pipelines.config.workflow import TrainConfig, WorkflowConfig
from pipelines.evaluation.latency import (
    CACHED,
    FEWER,
    FULL,
    Arm,
    Timing,
    device_of,
    family_arm,
    make_arms,
    make_family_arms,
    make_transfer_arms,
    measure,
)
from pipelines.evaluation.quality import NOISE_FLOOR, judge
from pipelines.runtime.ray_runtime import plainly


@plainly()
def evaluate(
    config: WorkflowConfig, artifact: RouterArtifact, family: Mapping[str, RouterArtifact] | None = None
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """The report of one router, JSON-ready, and its pictures by file name.

    Args:
        family: routers for other speeds, by name; each gets an arm on the same noise.

    Raises:
        NotFinite: an arm draws what is not finite.
    """
    family = family or {}
    settings = config.evaluate
    remote = ray.remote(num_cpus=1, num_gpus=int(settings.use_gpu))(measure)
    timing: Timing = ray.get(remote.remote(config, artifact, family))
    arms = make_arms(config, artifact, timing.fewer_steps) + make_family_arms(config, family)
    transfer = make_transfer_arms(config, artifact)
    quality = judge(config, timing.rows, arms + transfer)
    noise_floor = quality[FULL].pop(NOISE_FLOOR, None)
    report_arms = {arm.name: _times(arm, timing) | quality[arm.name] for arm in arms}
    for name, member in family.items():
        arm = report_arms[family_arm(name)]
        report_arms[family_arm(name)] = arm | _speeds(member, arm["speedup"])
    report = {
        "samples": settings.samples,
        "reuse": artifact.reuse,
        **_speeds(artifact, report_arms[CACHED]["speedup"]),
        "arms": report_arms,
    }
    if noise_floor:
        report[NOISE_FLOOR] = noise_floor
    if transfer:
        report["transfer"] = {arm.name: quality[arm.name] for arm in transfer}
    return report | verdict(report_arms, config.train), _pictures(config, artifact, family, timing)


def _speeds(artifact: RouterArtifact, measured: float) -> dict[str, Any]:
    """Of a router: how much it reuses, and what that is worth in MACs and in time."""
    ideal = artifact.ideal_speedup
    return {
        "method": artifact.method,
        "cur": artifact.plan.cur,
        "ideal_speedup": ideal,
        "measured_speedup": measured,
        "realised_share": (1 - 1 / measured) / (1 - 1 / ideal) if ideal > 1 else None,
    }


def report_of(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A member of the family, as if it had been evaluated alone."""
    arm = report["arms"][family_arm(name)]
    about = ("method", "cur", "ideal_speedup", "measured_speedup", "realised_share")
    quality = {key: value for key, value in arm.items() if key not in about}
    return {"samples": report["samples"]} | {key: arm[key] for key in about} | {"arms": {CACHED: quality}}


@plainly()
def with_sample(config: WorkflowConfig, artifact: RouterArtifact) -> RouterArtifact:
    """The artifact with the sample that others hold it to, drawn on a worker.

    Raises:
        NotFinite: it is not finite.
    """

    def record() -> RouterArtifact:
        model = load_model(config.model, device_of(config.evaluate.use_gpu)).model
        return record_sample(artifact, make_sampler(model, artifact.sampler))

    return ray.get(ray.remote(num_cpus=1, num_gpus=int(config.evaluate.use_gpu))(record).remote())


def _pictures(
    config: WorkflowConfig, artifact: RouterArtifact, family: Mapping[str, RouterArtifact], timing: Timing
) -> dict[str, Figure]:
    """Full above cached above fewer steps, same noise, and what they differ in; and the router."""
    cached = {CACHED: artifact} | {family_arm(name): one for name, one in family.items()}
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


def _times(arm: Arm, timing: Timing) -> dict[str, Any]:
    return {
        "num_inference_steps": arm.num_inference_steps,
        "seconds_per_image": timing.seconds_per_image[arm.name],
        "seconds_spread": timing.spread[arm.name],
        "speedup": timing.seconds_per_image[FULL] / timing.seconds_per_image[arm.name],
    }


def advice(train: TrainConfig) -> str:
    """For a router that is not worth having: which of its settings to turn, and which way."""
    turned = {
        "target_speedup": "ask for less speed",
        "target_cur": "reuse less",
        "target_psnr": "ask for nearer images",
    }
    longer = "Train longer (train.trajectories)"
    for name, words in turned.items():
        if value := getattr(train, name):
            return f"{longer}, or {words} (train.{name}, which is {value:g})."
    return f"{longer}, or weigh reuse less (train.sdt.beta, which is {train.sdt.beta:g})."


def verdict(arms: dict[str, dict[str, Any]], train: TrainConfig) -> dict[str, Any]:
    """Whether the router is worth having: nearer to the full images than fewer steps at equal time.

    Args:
        train: how it was trained.
    """
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
            f"{' and '.join(lost)}. {advice(train)}"
        )
    return {"worth_having": not lost, "verdict": words}
