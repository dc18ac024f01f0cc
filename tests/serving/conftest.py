"""What tests of the endpoint share, unless a module has its own: pipelines, a tiny DiT, several models."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_served_pipeline as tiny
from fastapi.testclient import TestClient
from ray.serve import context, multiplex
from ray.serve._private.common import DeploymentID, ReplicaID
from tiny_dit import make_artifact, write_model
from tiny_engine import make_engine

from harmonica.core.artifact import RouterArtifact
from harmonica.models.loading import load_model
from pipelines.serving.images_api import create_app
from pipelines.tracking.mlflow_runs import find_or_create


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX pipeline; nobody writes into it."""
    return tiny.write_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def artifact(folder: Path) -> RouterArtifact:
    """A router that was trained in it."""
    return tiny.train_router(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model"))
    return make_engine(load_model(model), make_artifact(model), fastest=make_artifact(model, seed=5))


@pytest.fixture(scope="module")
def client(source):
    with TestClient(create_app(source), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def failing(source):
    def fail(error):
        source.error = error

    yield fail
    source.error = None


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Model and router of each name."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    for number, name in enumerate("abc"):
        model = write_model(folder / name, seed=number)
        made[name] = (model, make_artifact(model, seed=number))
        made[name][1].save(folder / f"router-{name}")
    return made


@pytest.fixture
def replica(monkeypatch):
    """What Serve's multiplexing asks of the process that it runs in."""
    name = DeploymentID(name="Sampler", app_name="test")
    replica = context.ReplicaContext(
        replica_id=ReplicaID(unique_id="x", deployment_id=name),
        servable_object=None,
        _deployment_config=None,
        rank=None,
        world_size=1,
    )
    monkeypatch.setattr(context, "_INTERNAL_REPLICA_CONTEXT", replica)
    # What is told to Serve's controller: the names of the models that are loaded.
    controller = SimpleNamespace(record_request_routing_info=lambda info: None)
    monkeypatch.setattr(multiplex, "_get_global_client", lambda: controller)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A store that others are copied from: making one costs seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = tmp_path_factory.mktemp("template")
        find_or_create("register", "first", str(folder), {})
    return folder


@pytest.fixture
def store(template, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(template, tmp_path / "store")
    return tmp_path / "store"
