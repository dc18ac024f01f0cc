"""What tests of pipelines at the endpoint share, unless a module has its own."""

from pathlib import Path

import pytest
import tiny_served_pipeline as tiny

from harmonica.core.artifact import RouterArtifact


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX pipeline; nobody writes into it."""
    return tiny.write_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def artifact(folder: Path) -> RouterArtifact:
    """A router that was trained in it."""
    return tiny.train_router(folder)
