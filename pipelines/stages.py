"""Run the stages of one run; one whose results are there is skipped."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harmonica.cli.common import say
from harmonica.core.artifact import RouterArtifact
from harmonica.data.embedding_store import EmbeddingStore
from harmonica.data.prompts import PromptStore
from harmonica.io.paths import resolved
from harmonica.io.resolve import pinned
from harmonica.training.multi_target import target_name

from .compare.ranking import missing_name
from .config.workflow import Stage, WorkflowConfig
from .preflight import check_model, stages_to_do
from .promotion.publishing import Publisher
from .report.charts import png_of
from .report.summary import git_revision, summarise, versions
from .report.terminal import comparison_table
from .run_state import lease, resume
from .run_state.resume import (
    COMPARISON,
    COMPARISON_PICTURE,
    FAMILY,
    REPORT,
    ROUTER,
    WORKFLOW,
    work_folder,
)
from .run_state.routers import load_router
from .run_state.storage import RunStorage, settle_endpoint
from .runtime.cluster_address import check_address
from .runtime.ray_runtime import connect, is_private
from .runtime.resources import check_resources, say_shortage
from .tracking import mlflow_runs, mlflow_store
from .tracking.node_metrics import node_metrics


class Workflow:
    """The stages of one run, with its storage and its MLflow runs."""

    def __init__(self, config: WorkflowConfig) -> None:
        run_id = config.run_id or datetime.now(UTC).strftime(f"{config.preset}-%Y%m%d-%H%M%S")
        self.config = dataclasses.replace(config, run_id=run_id)
        if config.storage_endpoint or resolved(config.storage_path, "storage_path").startswith("s3:"):
            settle_endpoint(config.storage_endpoint)
        self.storage = RunStorage(config.storage_path, run_id, patient=True)
        # Absolute, since actors run in folders of their own.
        self.config = dataclasses.replace(self.config, storage_path=self.storage.root)
        self._class_names: tuple[str, ...] = ()
        self._parent: mlflow_runs.StageRun | None = None
        self._publisher: Publisher | None = None

    @property
    def publisher(self) -> Publisher:
        """Return what registers and serves the run's router; it needs `tracked`."""
        assert self._publisher is not None
        return self._publisher

    @property
    def refusal(self) -> str:
        """Return why the gate kept this run's router back, "" if it did not."""
        decision = self._publisher.decision if self._publisher else None
        return decision.message if decision is not None and decision.is_rejected else ""

    def check(self) -> None:
        """Refuse what can be refused before any work starts; change nothing.

        Raises:
            ValueError: names field, value and cure.
        """
        if not self.storage.is_local:  # not patient, since a wrong address should be reported within seconds
            RunStorage(self.storage.root, self.storage.run_id).check_writable()
        if "serve" in self.config.stages and is_private():
            from .serving.lifecycle import check_port

            check_port(self.config.serve)
        self.config, self._class_names = check_model(self.config, self.storage)
        if self.storage.is_local:
            self.storage.check_writable()
        resume.check(self.config, self.storage)
        mlflow_store.check_store(self.config.storage_path)
        check_address()
        check_resources(self.config, stages_to_do(self.config, self.storage))

    def claim(self) -> lease.Lease:
        """Return the right to write this run, to be held while it is `tracked`.

        Raises:
            ValueError: another process writes it.
        """
        return lease.claim(self.storage)

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Open one MLflow run for the workflow, in which the stages' runs are nested."""
        connect(self.config.storage_endpoint)
        say_shortage(self.config, stages_to_do(self.config, self.storage))
        self.config = resume.begin(self.config, self.storage)
        with (
            self._run_of(WORKFLOW, self._parameters()) as self._parent,
            node_metrics(self._parent, self.config.node_metrics_interval_s),
        ):
            self._publisher = Publisher(self.config, self.storage, self._parent)
            yield
        resume.mark_done(WORKFLOW, self.storage)

    def _parameters(self) -> dict[str, Any]:
        return self.config.to_dict() | {"versions": versions(), "git_revision": git_revision()}

    def run(self, stage: Stage) -> None:
        """Run one stage, or say that it is done already."""
        stages: dict[Stage, Callable[[], str]] = {
            "prompts": self._prompts,
            "train": self._train,
            "evaluate": self._evaluate,
            "sweep": self._sweep,
            "register": self.publisher.register,
            "serve": self._serve,
            "compare": self._compare,
        }
        started = time.monotonic()
        message = stages[stage]()
        resume.mark_done(stage, self.storage)
        say(f"[{stage}] {message} ({time.monotonic() - started:.0f} s)")

    def _stage(self, name: Stage) -> AbstractContextManager[mlflow_runs.StageRun]:
        return self._run_of(name, self.config.to_dict()[name])

    def _run_of(self, name: str, settings: dict[str, Any]) -> AbstractContextManager[mlflow_runs.StageRun]:
        progress = resume.recorded(self.storage)
        number = progress.generation(name) if progress.is_undone(name) else 1
        config = self.config
        return mlflow_runs.stage_run(
            name, config.run_id, config.storage_path, settings, self._parent, generation=number
        )

    def _is_finished(self, stage: Stage) -> bool:
        return resume.is_finished(stage, self.config, self.storage)

    def _prompts(self) -> str:
        from .data.embed_prompts import embed_prompts

        model, uri = self.config.model, self.storage.uri(work_folder("prompts", self.storage))
        if self.config.pipeline.enabled:
            return self._pipeline_prompts(uri)
        if self._is_finished("prompts"):
            return f"{len(PromptStore(uri))} prompts, done before"
        path = pinned(model.path, model.revision)
        with self._stage("prompts"):
            store = embed_prompts(self.config.prompts, path, uri)
        return f"{len(store)} prompts, {store.mean_stored_bytes:,.0f} bytes each"

    def _pipeline_prompts(self, uri: str) -> str:
        from .data.embed_for_pipeline import embed_for_pipeline

        if self._is_finished("prompts"):
            return f"{len(EmbeddingStore(uri))} prompts, done before"
        with self._stage("prompts"):
            store = embed_for_pipeline(self.config, uri)
        return f"{len(store)} prompts, {', '.join(store.manifest.names) or 'as texts'}"

    def _train(self) -> str:
        from .training.stage import train

        if self._is_finished("train"):
            return "done before"
        with self._stage("train") as run, tempfile.TemporaryDirectory() as folder:
            artifact, family = train(self.config, self.storage, run)
            for name, member in family.items():
                member.save(f"{folder}/{FAMILY}/{name}")
            self.storage.replace_folder(Path(folder) / FAMILY, FAMILY)
            # Last, since it is what says that the stage is finished.
            self.storage.replace_folder(artifact.save(f"{folder}/{ROUTER}"), ROUTER)
        speeds = [f"{one.ideal_speedup:.2f}x" for one in (artifact, *family.values())]
        return f"CUR {artifact.plan.cur:.1%}, ideal speedup {', '.join(speeds)}"

    def _evaluate(self) -> str:
        from .evaluation.stage import evaluate

        if self._is_finished("evaluate"):
            return "done before"
        artifact = load_router(self.storage, ROUTER)
        with self._stage("evaluate") as run:
            report, pictures = evaluate(self.config, artifact, self._family())
            for name, figure in pictures.items():
                run.client.log_figure(run.mlflow_run_id, figure, name)
            numbers = mlflow_runs.numbers(report.to_json())
            run.log(numbers)
            assert self._parent is not None
            self._parent.log(numbers)
            # Together, and the report last, which says that the stage is finished.
            for name, figure in pictures.items():
                self.storage.write_bytes(name, png_of(figure))
            stored = dataclasses.replace(report, run_id=self.config.run_id)
            self.storage.write_json(REPORT, stored.to_json())
        return report.verdict or ""

    def _family(self) -> dict[str, RouterArtifact]:
        """Return by name the routers that training made beside the first one."""
        names = map(target_name, self.config.train.extra_targets)
        return {name: load_router(self.storage, f"{FAMILY}/{name}") for name in names}

    def _compare(self) -> str:
        from .compare import results
        from .compare.stage import compare_methods

        if self._is_finished("compare") and results.is_complete(self.config, self.storage):
            return "done before"
        results.record(self.config, self.storage)
        with self._stage("compare") as run:
            comparison, figure = compare_methods(self.config, self.storage)
            run.client.log_figure(run.mlflow_run_id, figure, COMPARISON_PICTURE)
            run.client.log_dict(run.mlflow_run_id, comparison, COMPARISON)
            self.storage.write_bytes(COMPARISON_PICTURE, png_of(figure))
            self.storage.write_json(COMPARISON, comparison)
            names = [missing_name(one) for one in comparison["not_measured"]]
            run.client.set_tag(run.mlflow_run_id, "harmonica.not_measured", ", ".join(names) or "nothing")
        comparison_table(comparison)
        verdict: str = comparison["verdict"]
        return verdict

    def _sweep(self) -> str:
        from .sweep.stage import sweep

        if self._is_finished("sweep"):
            return "done before"
        with self._stage("sweep") as run:
            verdict: str = sweep(self.config, self.storage, run)["verdict"]
        return verdict

    def _serve(self) -> str:
        return self.publisher.serve(self._class_names[-1] if self._class_names else self._first_prompt())

    def _first_prompt(self) -> str:
        uri = self.storage.uri(work_folder("prompts", self.storage))
        return EmbeddingStore(uri).text(0) if self.config.pipeline.enabled else PromptStore(uri).row(0)[2]

    def summarise(self) -> None:
        """Write the report, print its table, and keep the endpoint up if it is to stay."""
        assert self._parent is not None
        summarise(self.config, self.storage, self._parent, self.publisher.url)
