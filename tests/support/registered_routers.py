"""A real MLflow store with routers of a tiny DiT, and an engine that watches it."""

import dataclasses
from pathlib import Path

from tiny_dit import make_artifact
from tiny_engine import CONFIG

from harmonica.core.golden_sample import record_sample
from harmonica.models.loading import load_model
from harmonica.samplers import make_sampler
from pipelines.serving.engine import GenerationEngine
from pipelines.serving.image_sampler import ImageSampler
from pipelines.serving.registry_watcher import RegistryWatcher
from pipelines.serving.serve_args import ServeArgs
from pipelines.tracking import registry
from pipelines.tracking.mlflow_runs import find_or_create, make_client

NAME = "tiny"


@dataclasses.dataclass
class Registry:
    """Registers routers under names, each the champion from then on."""

    store: Path
    uri: str = ""

    def add(self, run_id, artifact):
        run = find_or_create("register", run_id, str(self.store), {})
        self.uri = run.uri
        return registry.register(artifact.save(self.store / run_id), name=NAME, run=run)

    def files(self, run_id):
        """Where MLflow keeps a version's files."""
        run = find_or_create("register", run_id, str(self.store), {})
        root = run.client.get_run(run.mlflow_run_id).info.artifact_uri.removeprefix("file://")
        return Path(root) / "router"

    def move_alias(self, version):
        make_client(self.uri).set_registered_model_alias(NAME, registry.CHAMPION, version)


def make_watcher(model, uri):
    engine = GenerationEngine(ImageSampler(load_model(model)), NAME, CONFIG)
    return engine, RegistryWatcher(engine, ServeArgs(tracking_uri=uri, registered_model=NAME, model=model))


def recorded(model, seed):
    artifact = make_artifact(model, seed=seed)
    return record_sample(artifact, make_sampler(load_model(model).model, artifact.sampler))
