"""Whether a registered version becomes the champion: the gate is asked, and its answers are kept."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from mlflow.entities.model_registry import ModelVersion

from harmonica.core.artifact import RouterArtifact
from harmonica.core.golden_sample import check_sample
from harmonica.models.loading import load_model
from harmonica.samplers import make_sampler
from pipelines.config.promotion import Promote
from pipelines.config.workflow import WorkflowConfig
from pipelines.evaluation.latency import CACHED, device_of
from pipelines.promotion.gate import (
    FINITE,
    MEASURED_ON,
    Check,
    against_champion,
    finite_check,
    quality_checks,
)
from pipelines.tracking import registry
from pipelines.tracking.mlflow_runs import StageRun, numbers


@dataclass(frozen=True)
class Decision:
    """What became of a version, and why."""

    mode: Promote
    model: str
    version: str
    checks: tuple[Check, ...] = ()
    champion: str = ""
    """The version that was the champion before, "" for none."""
    tags: dict[str, str] = field(default_factory=dict)
    """What was measured."""

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.passed is False]

    @property
    def held_back_by(self) -> list[Check]:
        """Of the failed ones, those that count: all before the gate, else that something is not finite."""
        return [check for check in self.failed if self.mode == "gate" or check.name == FINITE]

    @property
    def is_promoted(self) -> bool:
        return self.mode != "never" and not self.held_back_by

    @property
    def is_refused(self) -> bool:
        return self.mode != "never" and bool(self.held_back_by)

    @property
    def outcome(self) -> str:
        """As the registry has it."""
        if self.mode == "never":
            return registry.NOT_ASKED
        if self.is_refused:
            return registry.REFUSED
        return registry.PASSED if self.mode == "gate" else registry.FORCED

    @property
    def words(self) -> str:
        name = f"version {self.version} of {self.model}"
        if self.is_promoted:
            return f"{name} is the champion" + ("" if self.mode == "gate" else " (promote is always)")
        if self.champion == self.version:
            stays = "it was made the champion by hand and stays it"
        else:
            stays = f"version {self.champion} stays the champion" if self.champion else "there is no champion"
        if self.mode == "never":
            return f"{name} is kept (promote is never), {stays}"
        why = "; ".join(check.words for check in self.held_back_by)
        return f"{name} is kept and not promoted, {stays}: {why}"

    def to_dict(self) -> dict[str, Any]:
        known = {name: value for name, value in asdict(self).items() if name != "tags"}
        return known | {"promoted": self.is_promoted, "outcome": self.outcome, "words": self.words}


def measurements(
    artifact: RouterArtifact, report: Mapping[str, Any] | None, *, use_gpu: bool
) -> dict[str, str]:
    """Of a version, as its tags: what it is for, and every number of the report that is about it."""
    sampler = artifact.sampler
    tags = {
        "reuse": artifact.reuse,
        "sampler": sampler.name,
        "num_inference_steps": str(sampler.num_inference_steps),
        "guidance_scale": f"{sampler.guidance_scale:g}",
    }
    found = {"cur": artifact.plan.cur, "ideal_speedup": artifact.ideal_speedup}
    if report is not None:
        about = {name: value for name, value in report.items() if name not in ("arms", "transfer")}
        found |= numbers(about) | numbers(report["arms"][CACHED])
        tags[MEASURED_ON] = "gpu" if use_gpu else "cpu"
    return tags | {name: f"{value:.6g}" for name, value in found.items()}


def cannot_draw(config: WorkflowConfig, artifact: RouterArtifact) -> str:
    """Why a router does not draw its recorded sample with the run's model and sampler, "" where it does."""
    if artifact.sample_CHW is None:
        return "the version has no recorded sample to hold it to"
    model = load_model(config.model, device_of(config.evaluate.use_gpu)).model
    try:
        artifact.check(model, config.sampler)
        check_sample(artifact, make_sampler(model, artifact.sampler))
    except ValueError as error:
        return str(error)
    return ""


def _reproduces(config: WorkflowConfig, version: str, uri: str) -> Check:
    """The version as the registry has it, on a worker."""
    try:
        artifact = registry.load_version(config.registered_model, version, uri)
    except ValueError as error:
        return Check("reproduces", False, str(error))
    remote = ray.remote(num_cpus=1, num_gpus=int(config.evaluate.use_gpu))(cannot_draw)
    why: str = ray.get(remote.remote(config, artifact))
    words = why or "it loads from the registry and draws its recorded sample"
    return Check("reproduces", not why, words)


def decide(
    config: WorkflowConfig,
    artifact: RouterArtifact,
    report: Mapping[str, Any] | None,
    version: str,
    run: StageRun,
) -> Decision:
    """Ask what `promote` and `promotion` want asked; changes nothing.

    Args:
        report: of the evaluation; None only where `promote` is not gate.
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
    champion: ModelVersion | None,
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
    return against_champion(artifact, tags, theirs, champion, config.promotion)


def carry_out(decision: Decision, run: StageRun) -> None:
    """Write the decision and its numbers to the registry; then, and only where it says so, move the alias."""
    answers = {True: "passed", False: "failed", None: "not asked or not comparable"}
    tags = {f"{registry.GATE}.{c.name}": f"{answers[c.passed]}: {c.words}" for c in decision.checks}
    tags |= decision.tags | {registry.GATE: decision.outcome, f"{registry.GATE}.decision": decision.words}
    registry.set_tags(run.client, decision.model, decision.version, tags)
    if decision.is_promoted:
        registry.promote(run.client, decision.model, decision.version)
