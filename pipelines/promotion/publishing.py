"""What becomes of a judged router: a registered version, the champion if it is let through, an endpoint."""

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harmonica.core.artifact import RouterArtifact
from harmonica.training.multi_target import member_name
from pipelines.config.workflow import WorkflowConfig
from pipelines.promotion.decision import Decision, carry_out, decide, measurements
from pipelines.run_state.resume import FAMILY, PROMOTION, REPORT, ROUTER, SERVED, is_current
from pipelines.run_state.routers import load_router
from pipelines.run_state.storage import RunStorage
from pipelines.tracking import mlflow_runs, registry


@contextmanager
def _with_recorded_sample(
    config: WorkflowConfig, storage: RunStorage, path: str
) -> Iterator[tuple[Path, RouterArtifact]]:
    """A router, fetched, and its folder; the sample that others hold it to is drawn where there is none."""
    from pipelines.evaluation.stage import with_sample

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
    report: Mapping[str, Any] | None,
    run: mlflow_runs.StageRun,
    tags: Mapping[str, str],
) -> str:
    """A router that is not the run's own as a version with its numbers, promoted by nothing but an alias that
    somebody moves; called again for the same MLflow run it makes no second one.

    Args:
        path: of its folder on the storage.
        run: MLflow's, of this router.
    """
    name = config.registered_model
    with _with_recorded_sample(config, storage, path) as (folder, artifact):
        all_tags = measurements(artifact, report, use_gpu=config.evaluate.use_gpu)
        all_tags |= {"run_id": config.run_id} | dict(tags)
        version = registry.register(folder, name=name, run=run, alias=None, tags=all_tags)
    registry.set_tags(run.client, name, version, all_tags | {registry.GATE: registry.NOT_ASKED})
    return version


class Publisher:
    """The stages register and serve of one run."""

    def __init__(self, config: WorkflowConfig, storage: RunStorage, run: mlflow_runs.StageRun) -> None:
        """
        Args:
            run: MLflow's, of the whole workflow.
        """
        self._config, self._storage, self._run = config, storage, run
        self.url = ""
        """Of the endpoint, where one was started."""
        self.decision: Decision | None = None
        """About this run's version, once it is made and not promoted before."""

    def register(self) -> str:
        """Make the version, once, and decide about it until it has been the champion."""
        words = self._register()
        family = [self._register_member(name) for name in map(member_name, self._config.train.others)]
        return words + (f"; beside it, as versions {', '.join(family)}" if family else "")

    def _report(self) -> Any:
        """Of this run's router as it is now, None where it is not judged."""
        return self._storage.read_json(REPORT) if is_current(REPORT, self._storage) else None

    def _register_member(self, name: str) -> str:
        """Of what training made for other speeds."""
        from pipelines.evaluation.stage import report_of

        config = self._config
        report = self._report()
        about = report_of(report, name) if report else None
        stage = f"{FAMILY} {name} of {self._run.mlflow_run_id[:8]}"
        with mlflow_runs.stage_run(stage, config.run_id, config.storage_path, {}, self._run) as run:
            if about is not None:
                run.log(mlflow_runs.numbers(about))
            version = register_beside(config, self._storage, f"{FAMILY}/{name}", about, run, {FAMILY: name})
        return f"{version} ({name})"

    def _register(self) -> str:
        config, name = self._config, self._config.registered_model
        found = registry.find(name, self._run)
        if found is not None and registry.was_promoted(found):
            return f"version {found.version} of {name}, done before"
        tags = {"run_id": config.run_id}
        with _with_recorded_sample(config, self._storage, ROUTER) as (folder, artifact):
            version = registry.register(folder, name=name, run=self._run, alias=None, tags=tags)
        report = self._report()
        self.decision = decide(config, artifact, report, version, self._run)
        carry_out(self.decision, self._run)
        self._storage.write_json(PROMOTION, self.decision.to_dict())
        return self.decision.words

    def serve(self, prompt: str) -> str:
        """Serve the champion, whichever version that is by now, and ask it for an image."""
        from pipelines import serve

        config = self._config
        version, why_not = self._champion()
        if why_not:
            return f"skipped: {why_not}"
        self.url = serve.deploy(
            config.serve, config.model, registered_model=config.registered_model, tracking_uri=self._run.uri
        )
        try:
            answer = serve.first_image(self.url, prompt, seed=1, api_keys_file=config.serve.api_keys_file)
            self._storage.write_bytes(SERVED, base64.b64decode(answer["data"][0]["b64_json"]))
        except BaseException:
            serve.shutdown()
            raise
        if not config.serve.keep:
            serve.shutdown()
        return f"{self.url} drew {prompt!r} in {answer['inference_time_s']:.2f} s{version}"

    def _champion(self) -> tuple[str, str]:
        """Where this run's router is not the champion: which version is, and why it cannot be served."""
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
