"""The gate's questions that numbers alone answer: good enough, fast enough, better than the champion.

A version's score is its PSNR to the full sampler's images plus `promotion.db_per_doubling` dB for every
doubling of measured speed, so at equal speed the nearer images win, and at equal nearness the faster router.
Only a champion for the same model weights and sampler settings (step count and guidance among them), measured
on the same kind of device, can be compared; any other holds nothing up.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mlflow.entities.model_registry import ModelVersion

from harmonica.core.artifact import RouterArtifact
from harmonica.validation.finite import not_finite
from pipelines.config.promotion import PromoteConfig
from pipelines.evaluation.latency import CACHED

MEASURED_ON = "measured_on"
"""Tag of a version: gpu or cpu."""


FINITE = "finite"
"""Name of the check that no way of promoting passes over."""


@dataclass(frozen=True)
class Check:
    """One question and its answer."""

    name: str
    passed: bool | None
    """None where it was not asked or cannot be answered; that holds nothing up."""
    words: str


def finite_check(artifact: RouterArtifact, report: Mapping[str, Any] | None) -> Check:
    """Whether everything known of a version is a number: asked whatever `promote` is."""
    found = {"ideal_speedup": artifact.ideal_speedup}
    if report is not None:
        found["measured_speedup"] = report["measured_speedup"]
        found |= {name: value for name, value in report["arms"][CACHED].items() if name.endswith("_to_full")}
    words = not_finite(found)
    if not words and artifact.sample_CHW is not None and not artifact.sample_CHW.isfinite().all():
        words = "its recorded sample is not finite"
    return Check(FINITE, not words, words or "its numbers and its sample are finite")


def score(psnr_db: float, speedup: float, db_per_doubling: float) -> float:
    """In dB; higher is better."""
    return psnr_db + db_per_doubling * math.log2(speedup)


def quality_checks(report: Mapping[str, Any], settings: PromoteConfig) -> list[Check]:
    """What the report alone answers."""
    cached, speedup = report["arms"][CACHED], report["measured_speedup"]
    psnr, least = cached["psnr_to_full"], settings.min_psnr_to_full
    checks = [
        Check(
            "psnr_to_full",
            psnr >= least if least else None,
            f"PSNR to full is {psnr:.2f} dB, {f'at least {least:g}' if least else 'no bound'} is asked",
        )
    ]
    if (most := settings.max_frechet_to_full) and "frechet_to_full" in cached:
        frechet = cached["frechet_to_full"]
        words = f"Frechet distance to full is {frechet:.4f}, at most {most:g} is asked"
        checks.append(Check("frechet_to_full", frechet <= most, words))
    else:
        words = (
            "Frechet distance to full is not measured" if most else "Frechet distance to full is not asked"
        )
        checks.append(Check("frechet_to_full", None, words))
    words = f"measured speedup is {speedup:.2f}x, at least {settings.min_speedup:g}x is asked"
    checks.append(Check("speedup", speedup >= settings.min_speedup, words))
    asked = settings.beat_fewer_steps
    worth = report["verdict"] if asked else "being better than fewer steps is not asked"
    checks.append(Check("fewer_steps", report["worth_having"] if asked else None, worth.rstrip(".")))
    return checks


def against_champion(
    ours: RouterArtifact,
    tags: Mapping[str, str],
    theirs: RouterArtifact,
    champion: ModelVersion,
    settings: PromoteConfig,
) -> Check:
    """Whether a version is better than the champion.

    Args:
        tags: of the version, as `measurements` makes them; the champion carries its own.
    """
    name, number = "champion", champion.version
    if why := _incomparable(ours, tags, theirs, champion.tags):
        return Check(name, None, f"version {number}, the champion, cannot be compared: {why}")
    if _is_same_router(ours, theirs):
        return Check(name, True, f"it is the router of version {number}, the champion, again")
    new, old = (
        score(float(of["psnr_to_full"]), float(of["measured_speedup"]), settings.db_per_doubling)
        for of in (tags, champion.tags)
    )
    shown = [
        f"{float(of['psnr_to_full']):.2f} dB at {float(of['measured_speedup']):.2f}x"
        for of in (tags, champion.tags)
    ]
    compared = f"score {new:.2f} ({shown[0]}) and version {number}, the champion, {old:.2f} ({shown[1]})"
    return Check(name, new > old, compared)


def _incomparable(
    ours: RouterArtifact, tags: Mapping[str, str], theirs: RouterArtifact, their_tags: Mapping[str, str]
) -> str:
    """Why the two are not for the same thing, "" where they are."""
    if theirs.model != ours.model:
        return "it is for another model"
    made_for, given = theirs.sampler.to_dict(), ours.sampler.to_dict()
    if other := sorted(key for key in made_for | given if made_for.get(key) != given.get(key)):
        return f"it is for another sampler.{other[0]}"
    if not {"psnr_to_full", "measured_speedup"} <= their_tags.keys():
        return "its numbers are not recorded"
    if their_tags.get(MEASURED_ON) != tags[MEASURED_ON]:
        return f"it was measured on a {their_tags.get(MEASURED_ON)}, this one on a {tags[MEASURED_ON]}"
    return ""


def _is_same_router(ours: RouterArtifact, theirs: RouterArtifact) -> bool:
    if (ours.plan.to_strings(), ours.reuse) != (theirs.plan.to_strings(), theirs.reuse):
        return False
    a, b = ours.forecast_TBK, theirs.forecast_TBK
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)
