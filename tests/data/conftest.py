"""What tests of prompts share: a small text encoder, and a store of what it embedded."""

from pathlib import Path

import pytest
from tiny_text import make_prompts, write_store, write_text_folder

from harmonica.data.prompts import PromptStore
from harmonica.data.text_encoder import TextEncoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's tokenizer and text encoder."""
    return write_text_folder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder.load(folder, dtype="float32")


@pytest.fixture
def store(encoder: TextEncoder, tmp_path: Path) -> PromptStore:
    """Ten prompts in three parts."""
    return write_store(tmp_path / "store", encoder, make_prompts(10))
