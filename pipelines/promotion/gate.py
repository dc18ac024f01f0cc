"""Check a version's quality and speed, against bounds and against the champion.

A version's score is its PSNR to the full sampler's images plus `promotion.db_per_doubling` dB for every
doubling of measured speed: at equal speed the higher PSNR wins, and at equal PSNR the faster router.
A champion is compared only if it was made for the same model weights and sampler settings (step count and
guidance among them) and measured on the same kind of device; otherwise the comparison is skipped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.evaluation.evaluation_report import FEWER, EvaluationReport
from harmonica.evaluation.metric_table import (
    FRECHET_TO_FULL,
    IDEAL_SPEEDUP,
    MEASURED_SPEEDUP,
    PSNR_TO_FULL,
    SPEEDUP,
    TO_FULL,
)
from harmonica.validation.finite import not_finite

from ..config.promotion import PromoteConfig

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

MEASURED_ON = "measured_on"
"""Tag of a version: gpu or cpu."""
FINITE = "finite"
"""Name of the check that applies whatever `promote` is."""


@dataclass(frozen=True)
class Check:
    """A check of the gate has a name, a result and the reason for it."""

    name: str
    passed: bool | None
    """None if the check was not asked for or cannot be made; that does not block promotion."""
    message: str


def finite_check(artifact: RouterArtifact, report: EvaluationReport | None) -> Check:
    """Check that all numbers of a version, and its golden sample, are finite."""
    found = {IDEAL_SPEEDUP: artifact.ideal_speedup}
    if report is not None:
        found[MEASURED_SPEEDUP] = report.speeds.measured_speedup
        found |= {key: one.value for key, one in report.cached.metrics.items() if key.endswith(TO_FULL)}
    message = not_finite(found)
    if not message and artifact.sample_CHW is not None and not artifact.sample_CHW.isfinite().all():
        message = "its recorded sample is not finite"
    return Check(FINITE, not message, message or "its numbers and its sample are finite")


def score(psnr_db: float, speedup: float, db_per_doubling: float) -> float:
    """Return the score of a version in dB; higher is better."""
    return psnr_db + db_per_doubling * math.log2(speedup)


def quality_checks(report: EvaluationReport, settings: PromoteConfig) -> list[Check]:
    """Return the checks that need the report alone."""
    speedup = report.speeds.measured_speedup
    psnr, least = report.cached.psnr_to_full, settings.min_psnr_to_full
    checks = [
        Check(
            PSNR_TO_FULL,
            psnr >= least if least else None,
            f"PSNR to full is {psnr:.2f} dB, {f'at least {least:g}' if least else 'no bound'} is asked",
        )
    ]
    frechet, most = report.cached.frechet_to_full, settings.max_frechet_to_full
    if most and frechet is not None:
        message = f"Frechet distance to full is {frechet:.4f}, at most {most:g} is asked"
        checks.append(Check(FRECHET_TO_FULL, frechet <= most, message))
    else:
        message = (
            "Frechet distance to full is not measured" if most else "Frechet distance to full is not asked"
        )
        checks.append(Check(FRECHET_TO_FULL, None, message))
    message = f"measured speedup is {speedup:.2f}x, at least {settings.min_speedup:g}x is asked"
    checks.append(Check(SPEEDUP, speedup >= settings.min_speedup, message))
    asked = settings.beat_fewer_steps
    worth = (report.verdict or "") if asked else "being better than fewer steps is not asked"
    checks.append(Check(FEWER, report.worth_having if asked else None, worth.rstrip(".")))
    return checks


def compare_with_champion(
    ours: RouterArtifact,
    tags: Mapping[str, str],
    theirs: RouterArtifact,
    champion: "ModelVersion",
    settings: PromoteConfig,
) -> Check:
    """Check that a version has a higher score than the champion.

    Args:
        tags: tags of the version, from `measurements`; the champion carries its own.
    """
    name, number = "champion", champion.version
    if why := _incomparable(ours, tags, theirs, champion.tags):
        return Check(name, None, f"version {number}, the champion, cannot be compared: {why}")
    if _is_same_router(ours, theirs):
        return Check(name, True, f"it is the router of version {number}, the champion, again")
    new, old = (
        score(float(of[PSNR_TO_FULL]), float(of[MEASURED_SPEEDUP]), settings.db_per_doubling)
        for of in (tags, champion.tags)
    )
    shown = [
        f"{float(of[PSNR_TO_FULL]):.2f} dB at {float(of[MEASURED_SPEEDUP]):.2f}x"
        for of in (tags, champion.tags)
    ]
    compared = f"score {new:.2f} ({shown[0]}) and version {number}, the champion, {old:.2f} ({shown[1]})"
    return Check(name, new > old, compared)


def _incomparable(
    ours: RouterArtifact, tags: Mapping[str, str], theirs: RouterArtifact, their_tags: Mapping[str, str]
) -> str:
    """Return why the two cannot be compared, "" if they can."""
    if theirs.model != ours.model:
        return "it is for another model"
    made_for, given = theirs.sampler.to_dict(), ours.sampler.to_dict()
    if other := sorted(key for key in made_for | given if made_for.get(key) != given.get(key)):
        return f"it is for another sampler.{other[0]}"
    if not {PSNR_TO_FULL, MEASURED_SPEEDUP} <= their_tags.keys():
        return "its numbers are not recorded"
    if their_tags.get(MEASURED_ON) != tags[MEASURED_ON]:
        return f"it was measured on a {their_tags.get(MEASURED_ON)}, this one on a {tags[MEASURED_ON]}"
    return ""


def _is_same_router(ours: RouterArtifact, theirs: RouterArtifact) -> bool:
    one, other = ((each.plan.to_strings(), each.reuse, each.segments) for each in (ours, theirs))
    if one != other:
        return False
    return _are_near(ours.forecast_TBK, theirs.forecast_TBK) and _are_near(
        ours.correction_TJ, theirs.correction_TJ
    )


def _are_near(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)
