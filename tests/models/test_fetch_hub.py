"""Models from the hub (its endpoints on loopback): fetched once, pinned, and what is missing is said."""

from pathlib import Path

import pytest
import torch
from fetching import REPO, fetch, names
from hub_server import COMMIT, serve_hub
from tiny_pipeline import write_pipeline

from harmonica.io.hub import from_hub
from harmonica.io.resolve import pinned
from harmonica.models.loading import ModelConfig, load_model


def test_a_repository_without_a_model_or_with_a_broken_index_says_so(tmp_path):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "notes.txt").write_text("x")
    with serve_hub(REPO, tmp_path / "repository") as hub:
        _, said = fetch(tmp_path / "hf", hub.endpoint, REPO, COMMIT)
        assert f"model.path {REPO} holds no model, but notes.txt: give the id of a diffusers pipeline" in said
        (tmp_path / "repository" / "model_index.json").write_text("{")
        _, said = fetch(tmp_path / "other", hub.endpoint, REPO, COMMIT)
        assert f"model.path {REPO}: model_index.json cannot be read" in said


def test_a_revision_is_pinned_to_ids_of_the_hub_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pinned("org/name", "v1") == "org/name@v1"
    for path in ("org/name@v2", "s3://bucket/model", "builtin:fashion-dit", str(tmp_path), "./org/name"):
        assert pinned(path, "v1") == path
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert pinned("org/name", "v1") == "org/name"
    assert pinned("other/name", "") == "other/name"


@pytest.fixture
def repository(tmp_path) -> Path:
    """With a transformer in safetensors, a VAE in pickle, and what nobody needs."""
    folder = write_pipeline(tmp_path / "repository")
    vae = folder / "vae" / "diffusion_pytorch_model"
    torch.save({}, vae.with_suffix(".bin"))
    vae.with_suffix(".safetensors").unlink()
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"not needed")
    (folder / "README.md").write_text("not needed")
    return folder


def test_a_hub_model_is_fetched_once_and_then_needs_no_network(repository, tmp_path):
    with serve_hub(REPO, repository) as hub:
        found, said = fetch(tmp_path / "hf", hub.endpoint, REPO, COMMIT)
        assert found, said
        assert names(Path(found)) == [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.bin",
        ]
        ours = load_model(ModelConfig(path=found)).model
        assert ours.fingerprint() == load_model(ModelConfig(path=str(repository))).model.fingerprint()
        asked = len(hub.requests)
        assert fetch(tmp_path / "hf", hub.endpoint, f"{REPO}@{COMMIT}")[0] == found
        assert not [path for path in hub.requests[asked:] if "resolve" in path]
    assert fetch(tmp_path / "hf", hub.endpoint, REPO, COMMIT, offline=True)[0] == found


def test_a_hub_that_does_not_list_its_files_is_blamed_for_it(repository, tmp_path, monkeypatch):
    """It answers again at once: a part of the model is not taken for all of it."""
    from huggingface_hub import HfApi

    def down(*_, **__):
        raise ConnectionError("the hub is down")

    monkeypatch.setattr(HfApi, "list_repo_files", down)
    monkeypatch.setattr("huggingface_hub.snapshot_download", _only_cached)
    with pytest.raises(ValueError, match=r"ConnectionError: the hub is down\): check id"):
        from_hub(REPO, COMMIT, "model.path")


def _only_cached(*_, local_files_only=False, **__):
    assert local_files_only, "nothing is fetched that was not listed"
    raise FileNotFoundError("no snapshot")


def test_what_the_hub_does_not_have_says_what_to_check(repository, tmp_path):
    with serve_hub(REPO, repository) as hub:
        _, said = fetch(tmp_path / "hf", hub.endpoint, REPO, "v9")
        assert f"ValueError: model.path {REPO} at v9 is not in {tmp_path}/hf/hub (RevisionNotFound" in said
        assert "check id, revision, access and network, or give a local folder" in said
        _, said = fetch(tmp_path / "hf", hub.endpoint, REPO, COMMIT, offline=True)
        assert f"at {COMMIT} is not in {tmp_path}/hf/hub, and HF_HUB_OFFLINE forbids to fetch it" in said
        assert "v9" in hub.requests[-1], "nothing is asked for that is known not to be there"
