"""What tests of the endpoint share, unless a module has its own: pipelines, and a tiny DiT."""

from pathlib import Path

import pytest
import tiny_served_pipeline as tiny
from fastapi.testclient import TestClient
from tiny_dit import make_artifact, write_model
from tiny_engine import make_engine

from harmonica.core.artifact import RouterArtifact
from harmonica.models.loading import load_model
from pipelines.serving.images_api import create_app


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
