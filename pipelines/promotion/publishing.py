"""Run the stages `register` and `serve`.

An evaluated router is registered and, if it passes the gate, promoted; the champion is served.
"""

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from harmonica.core.artifact import RouterArtifact
from harmonica.evaluation.evaluation_report import EvaluationReport
from harmonica.training.multi_target import target_name

from ..config.workflow import WorkflowConfig
from ..run_state.resume import FAMILY, PROMOTION, REPORT, ROUTER, SERVED, is_current
from ..run_state.routers import load_router
from ..run_state.storage import RunStorage
from ..tracking import mlflow_runs, registry
from .decision import Decision, apply_decision, decide, measurements


@contextmanager
def _with_recorded_sample(
    config: WorkflowConfig, storage: RunStorage, path: str
) -> Iterator[tuple[Path, RouterArtifact]]:
    """Yield a router's local folder and the router, with a golden sample.

    A router that has no golden sample gets one, also on the storage.
    """
    from ..evaluation.stage import with_sample

    with storage.local_folder(path) as folder:
        artifact = RouterArtifact.load(folder)
        if artifact.sample_CHW is None:
            with_sample(config, artifact).save(folder)
            storage.upload_folder(folder, path)
        yield folder, artifact


def register_beside(
    config: WorkflowConfig,
    storage: RunStorage,
    path: str,
    report: EvaluationReport | None,
    run: mlflow_runs.StageRun,
    tags: Mapping[str, str],
) -> str:
    """Register a router other than the run's own as a version with its numbers.

    It is never promoted automatically; move the MLflow alias to promote it. A second call for the same MLflow
    run creates no second version.

    Args:
        path: the router's folder on the storage.
        report: the router's numbers; None if it was not evaluated.
        run: the MLflow run of this router.
        tags: tags of the version, beside those of its numbers.

    Returns:
        The version.
    """
    name = config.registered_model
    with _with_recorded_sample(config, storage, path) as (folder, artifact):
        all_tags = measurements(artifact, report, use_gpu=config.evaluate.use_gpu)
        all_tags |= {"run_id": config.run_id} | dict(tags)
        version = registry.register(folder, name=name, run=run, alias=None, tags=all_tags)
    registry.set_tags(run.client, name, version, all_tags | {registry.GATE: registry.NOT_ASKED})
    return version


class Publisher:
    """A publisher runs the stages `register` and `serve` of one run."""

    def __init__(self, config: WorkflowConfig, storage: RunStorage, run: mlflow_runs.StageRun) -> None:
        """Prepare the two stages; nothing is published before they are called.

        Args:
            run: the MLflow run of the whole workflow.
        """
        self._config, self._storage, self._run = config, storage, run
        self.url = ""
        """URL of the endpoint, "" if none was started."""
        self.decision: Decision | None = None
        """Decision about this run's version; None before it is made, and if it was promoted before."""

    def register(self) -> str:
        """Register the version once, and decide about it until it has been the champion."""
        message = self._register()
        family = [self._register_member(name) for name in map(target_name, self._config.train.extra_targets)]
        return message + (f"; beside it, as versions {', '.join(family)}" if family else "")

    def _report(self) -> EvaluationReport | None:
        """Return the report of this run's current router, None if it was not evaluated."""
        if not is_current(REPORT, self._storage):
            return None
        return EvaluationReport.from_json(self._storage.read_json(REPORT))

    def _register_member(self, name: str) -> str:
        """Register a router that training made for another speed."""
        config = self._config
        report = self._report()
        about = report.of_member(name) if report is not None else None
        stage = f"{FAMILY} {name} of {self._run.mlflow_run_id[:8]}"
        with mlflow_runs.stage_run(stage, config.run_id, config.storage_path, {}, self._run) as run:
            if about is not None:
                run.log(mlflow_runs.numbers(about.to_json()))
            version = register_beside(config, self._storage, f"{FAMILY}/{name}", about, run, {FAMILY: name})
        return f"{version} ({name})"

    def _register(self) -> str:
        config, name = self._config, self._config.registered_model
        found = registry.version_of_run(name, self._run)
        if found is not None and registry.was_promoted(found):
            return f"version {found.version} of {name}, done before"
        tags = {"run_id": config.run_id}
        with _with_recorded_sample(config, self._storage, ROUTER) as (folder, artifact):
            version = registry.register(folder, name=name, run=self._run, alias=None, tags=tags)
        report = self._report()
        self.decision = decide(config, artifact, report, version, self._run)
        apply_decision(self.decision, self._run)
        self._storage.write_json(PROMOTION, self.decision.to_dict())
        return self.decision.message

    def serve(self, prompt: str) -> str:
        """Serve the current champion, whichever version that is, and request one image."""
        from ..serving.client import first_image
        from ..serving.lifecycle import deploy, shutdown

        config = self._config
        version, why_not = self._champion()
        if why_not:
            return f"skipped: {why_not}"
        self.url = deploy(
            config.serve, config.model, registered_model=config.registered_model, tracking_uri=self._run.uri
        )
        try:
            answer = first_image(self.url, prompt, seed=1, api_keys_file=config.serve.api_keys_file)
            self._storage.write_bytes(SERVED, base64.b64decode(answer["data"][0]["b64_json"]))
        except BaseException:
            shutdown(config.serve)
            raise
        if not config.serve.keep:
            shutdown(config.serve)
        return f"{self.url} generated {prompt!r} in {answer['inference_time_s']:.2f} s{version}"

    def _champion(self) -> tuple[str, str]:
        """Return which other version is the champion, and why it cannot be served.

        Either is "" if there is no such version, or no reason.
        """
        decision = self.decision
        if decision is None or decision.is_promoted:
            return "", ""
        if not decision.champion:
            return "", f"no version of {decision.model} is the champion"
        try:
            theirs = registry.load_version(decision.model, decision.champion, self._run.uri)
        except ValueError as error:
            return "", f"version {decision.champion}, the champion, is damaged: {error}"
        ours = load_router(self._storage, ROUTER)
        if theirs.model != ours.model:
            return "", f"version {decision.champion}, the champion, is for another model"
        return f" with version {decision.champion}, the champion", ""
