"""Decide whether a registered version becomes the champion, and record why."""

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import ray

from harmonica.core.artifact import RouterArtifact
from harmonica.evaluation.evaluation_report import EvaluationReport
from harmonica.evaluation.metric_table import CUR, IDEAL_SPEEDUP, NUM_INFERENCE_STEPS

from ..config.promotion import Promote
from ..config.workflow import WorkflowConfig
from ..evaluation.latency import device_of
from ..evaluation.open_model import open_model
from ..tracking import registry
from ..tracking.mlflow_runs import StageRun, numbers
from .gate import (
    FINITE,
    MEASURED_ON,
    Check,
    compare_with_champion,
    finite_check,
    quality_checks,
)

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Decision:
    """The decision is whether a version is promoted, with the checks behind that."""

    mode: Promote
    model: str
    version: str
    checks: tuple[Check, ...] = ()
    champion: str = ""
    """The version that was the champion before, "" if there was none."""
    tags: dict[str, str] = field(default_factory=dict)
    """The measurements, as tags of the version."""

    @property
    def failed(self) -> list[Check]:
        """Return the checks that did not pass."""
        return [check for check in self.checks if check.passed is False]

    @property
    def blocking_checks(self) -> list[Check]:
        """Return the failed checks that count.

        These are all of them if the mode is `gate`, else only `finite`.
        """
        return [check for check in self.failed if self.mode == "gate" or check.name == FINITE]

    @property
    def is_promoted(self) -> bool:
        """Return whether the version becomes the champion."""
        return self.mode != "never" and not self.blocking_checks

    @property
    def is_rejected(self) -> bool:
        """Return whether a check keeps the version from being the champion."""
        return self.mode != "never" and bool(self.blocking_checks)

    @property
    def outcome(self) -> str:
        """Return the value of the registry's tag."""
        if self.mode == "never":
            return registry.NOT_ASKED
        if self.is_rejected:
            return registry.REFUSED
        return registry.PASSED if self.mode == "gate" else registry.FORCED

    @property
    def message(self) -> str:
        """Return the decision in a sentence, with its reasons."""
        name = f"version {self.version} of {self.model}"
        if self.is_promoted:
            return f"{name} is the champion" + ("" if self.mode == "gate" else " (promote is always)")
        if self.champion == self.version:
            stays = "it was made the champion by hand and stays it"
        else:
            stays = f"version {self.champion} stays the champion" if self.champion else "there is no champion"
        if self.mode == "never":
            return f"{name} is kept (promote is never), {stays}"
        why = "; ".join(check.message for check in self.blocking_checks)
        return f"{name} is kept and not promoted, {stays}: {why}"

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of `promotion.json`.

        The key of a message is `words`, as in older runs.
        """
        known = {name: value for name, value in asdict(self).items() if name != "tags"}
        known["checks"] = [{"name": c.name, "passed": c.passed, "words": c.message} for c in self.checks]
        return known | {"promoted": self.is_promoted, "outcome": self.outcome, "words": self.message}


def measurements(
    artifact: RouterArtifact, report: EvaluationReport | None, *, use_gpu: bool
) -> dict[str, str]:
    """Return a version's tags: what it was made for, and each number of its report."""
    sampler = artifact.sampler
    tags = {
        "reuse": artifact.reuse,
        "sampler": sampler.name,
        NUM_INFERENCE_STEPS: str(sampler.num_inference_steps),
        "guidance_scale": f"{sampler.guidance_scale:g}",
    }
    found = {CUR: artifact.plan.cur, IDEAL_SPEEDUP: artifact.ideal_speedup}
    if report is not None:
        about = dataclasses.replace(report, variants={}, transfer={})
        found |= numbers(about.to_json()) | numbers(report.cached.to_json())
        tags[MEASURED_ON] = "gpu" if use_gpu else "cpu"
    return tags | {name: f"{value:.6g}" for name, value in found.items()}


def reproduction_error(config: WorkflowConfig, artifact: RouterArtifact) -> str:
    """Return why a router does not reproduce its golden sample; "" if it does.

    The sample is generated with this run's model.
    """
    if artifact.sample_CHW is None:
        return "the version has no recorded sample to compare with"
    model = open_model(config, device_of(config.evaluate.use_gpu))
    try:
        model.check_sample(artifact)
    except ValueError as error:
        return str(error)
    return ""


def _reproduces(config: WorkflowConfig, version: str, uri: str) -> Check:
    """Check on a worker that the registered version reproduces its sample."""
    try:
        artifact = registry.load_version(config.registered_model, version, uri)
    except ValueError as error:
        return Check("reproduces", False, str(error))
    remote = ray.remote(num_cpus=1, num_gpus=int(config.evaluate.use_gpu))(reproduction_error)
    why: str = ray.get(remote.remote(config, artifact))
    message = why or "it loads from the registry and draws its recorded sample"
    return Check("reproduces", not why, message)


def decide(
    config: WorkflowConfig,
    artifact: RouterArtifact,
    report: EvaluationReport | None,
    version: str,
    run: StageRun,
) -> Decision:
    """Run the checks that `promote` and `promotion` ask for.

    Nothing is changed in the registry.

    Args:
        report: the report of the evaluation; None only if `promote` is not `gate`.
    """
    settings, name = config.promotion, config.registered_model
    champion = registry.current(name, registry.CHAMPION, run.uri)
    tags = measurements(artifact, report, use_gpu=config.evaluate.use_gpu)
    checks = [finite_check(artifact, report)]
    if report is not None:
        checks += quality_checks(report, settings)
    if config.promote == "gate":
        assert report is not None, "checked before any work started"
        checks.append(_reproduces(config, version, run.uri))
        checks.append(_champion_check(artifact, tags, champion, version, config, run.uri))
    number = str(champion.version) if champion is not None else ""
    return Decision(config.promote, name, version, tuple(checks), number, tags)


def _champion_check(
    artifact: RouterArtifact,
    tags: Mapping[str, str],
    champion: "ModelVersion | None",
    version: str,
    config: WorkflowConfig,
    uri: str,
) -> Check:
    if champion is None:
        return Check("champion", None, "there is no champion yet")
    if not config.promotion.beat_champion:
        return Check("champion", None, "being better than the champion is not asked")
    if str(champion.version) == version:
        return Check("champion", True, "it is the champion")
    try:
        theirs = registry.load_version(config.registered_model, str(champion.version), uri)
    except ValueError as error:
        return Check("champion", None, f"version {champion.version}, the champion, is damaged: {error}")
    return compare_with_champion(artifact, tags, theirs, champion, config.promotion)


def apply_decision(decision: Decision, run: StageRun) -> None:
    """Write the decision to the registry, then move the alias if it is a promotion.

    The version gets the decision and its numbers as tags.
    """
    answers = {True: "passed", False: "failed", None: "not asked or not comparable"}
    tags = {f"{registry.GATE}.{c.name}": f"{answers[c.passed]}: {c.message}" for c in decision.checks}
    tags |= decision.tags | {registry.GATE: decision.outcome, f"{registry.GATE}.decision": decision.message}
    registry.set_tags(run.client, decision.model, decision.version, tags)
    if decision.is_promoted:
        registry.promote(run.client, decision.model, decision.version)
