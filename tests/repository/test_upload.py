"""What `ray job submit --working-dir .` takes along: the program with its models, and no other weights."""

import shutil
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

ROOT = Path(__file__).parents[2]
LIMIT = 100 * 2**20
"""Of one request to Ray's job server."""


@pytest.fixture
def is_left_out(tmp_path):
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    rules = get_excludes_from_ignore_files(tmp_path, include_gitignore=True)
    return lambda name: any(rule(tmp_path / name) for rule in rules)


@pytest.mark.parametrize(
    "name", ["DiT-XL-2-256x256.pt", "DiT/transformer/diffusion_pytorch_model.safetensors", "data.tar.gz"]
)
def test_other_models_stay_where_they_are(name, is_left_out):
    assert is_left_out(name)


@pytest.mark.parametrize("name", ["workflow.py", "prompts.txt", "data/prompts.parquet", "pyproject.toml"])
def test_what_a_job_reads_goes_along(name, is_left_out):
    assert not is_left_out(name)


def test_the_program_goes_along_whole_and_is_far_from_the_limit(is_left_out):
    found = [path for top in ("harmonica", "pipelines") for path in (ROOT / top).rglob("*") if path.is_file()]
    found = [path for path in found if "__pycache__" not in path.parts]
    example = ROOT / "pipelines/pretrain/fashion-sd3/transformer/diffusion_pytorch_model.safetensors"
    assert is_left_out(example.relative_to(ROOT)), "no job reads it"
    found.remove(example)
    assert not [path for path in found if is_left_out(path.relative_to(ROOT))]
    assert sum(path.stat().st_size for path in found) < LIMIT / 3
