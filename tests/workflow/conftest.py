"""What tests of the preset `pipeline` share, unless a module has its own."""

from pathlib import Path

import pytest
from tiny_pipeline_folder import write_pipeline_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline_folder(tmp_path_factory.mktemp("pipeline") / "chroma")
