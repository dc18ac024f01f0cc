"""What becomes of a judged router: a registered version, the champion if it is let through, an endpoint."""

import base64

from harmonica.artifact import RouterArtifact
from pipelines import registry, tracking
from pipelines.config import WorkflowConfig
from pipelines.promotion import Decision, carry_out, decide
from pipelines.resume import PROMOTION, REPORT, ROUTER, SERVED
from pipelines.storage import RunStorage


class Publisher:
    """The stages register and serve of one run."""

    def __init__(self, config: WorkflowConfig, storage: RunStorage, run: tracking.StageRun) -> None:
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
        from pipelines.evaluate import with_sample

        config, name = self._config, self._config.registered_model
        found = registry.find(name, self._run)
        if found is not None and registry.was_promoted(found):
            return f"version {found.version} of {name}, done before"
        folder = self._storage.download_folder(ROUTER)
        artifact = RouterArtifact.load(folder)
        if artifact.sample_CHW is None:
            folder = with_sample(config, artifact).save(folder)
            self._storage.upload_folder(folder, ROUTER)
        version = registry.register(
            folder, name=name, run=self._run, alias=None, tags={"run_id": config.run_id}
        )
        report = self._storage.read_json(REPORT) if self._storage.exists(REPORT) else None
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
            answer = serve.first_image(self.url, prompt, seed=1)
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
        ours = RouterArtifact.load(self._storage.download_folder(ROUTER))
        if theirs.model != ours.model:
            return "", f"version {decision.champion}, the champion, is for another model"
        return f" with version {decision.champion}, the champion", ""
