"""Routers in MLflow's registry, on a real SQLite store."""

import json

import pytest
import torch
from tiny_dit import make_artifact, write_model

from pipelines.tracking import registry
from pipelines.tracking.mlflow_runs import find_or_create

NAME = "routers"


@pytest.fixture(autouse=True)
def local_store(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Storage folder whose database exists: making one costs seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "dit")


def register_one(store, model, folder, run_id, seed):
    run = find_or_create("register", run_id, str(store), {})
    artifact = make_artifact(model, seed=seed)
    version = registry.register(
        artifact.save(folder), name=NAME, run=run, tags={"cur": f"{artifact.plan.cur}"}
    )
    return run, artifact, version


def test_registered_twice_is_one_version_and_the_newest_run_is_champion(store, model, tmp_path):
    run, first, version = register_one(store, model, tmp_path / "first", "a", seed=1)
    assert version == "1"
    assert registry.register(tmp_path / "first", name=NAME, run=run) == "1"
    assert len(run.client.search_model_versions(f"name = '{NAME}'")) == 1

    loaded, found = registry.load(NAME, "champion", run.uri)
    assert found == "1"
    assert torch.equal(loaded.logits_TB, first.logits_TB)
    assert (loaded.plan, loaded.sampler, loaded.model) == (first.plan, first.sampler, first.model)

    _, second, version = register_one(store, model, tmp_path / "second", "b", seed=2)
    assert version == "2"
    loaded, found = registry.load(NAME, "champion", run.uri)
    assert found == "2"
    assert torch.equal(loaded.logits_TB, second.logits_TB)
    stored = run.client.get_model_version(NAME, "2")
    assert stored.tags == {"cur": str(second.plan.cur), "harmonica.promoted_to": "champion"}
    assert stored.source.endswith("/artifacts/router")


def test_done_again_it_takes_the_alias_from_no_later_version(store, model, tmp_path):
    run, _, earlier = register_one(store, model, tmp_path / "earlier", "earlier", seed=7)
    assert registry.was_promoted(registry.version_of_run(NAME, run))
    _, _, later = register_one(store, model, tmp_path / "later", "later", seed=8)
    assert registry.register(tmp_path / "earlier", name=NAME, run=run) == earlier
    assert registry.resolve(NAME, "champion", run.uri) == later

    # Killed between the version and its alias, which is the one case where it is moved.
    run.client.delete_model_version_tag(NAME, earlier, "harmonica.promoted_to")
    assert not registry.was_promoted(registry.version_of_run(NAME, run))
    registry.register(tmp_path / "earlier", name=NAME, run=run)
    assert registry.resolve(NAME, "champion", run.uri) == earlier


def test_a_registered_version_keeps_its_files(store, model, tmp_path):
    run, first, version = register_one(store, model, tmp_path / "first", "kept", seed=3)
    make_artifact(model, seed=4).save(tmp_path / "other")
    assert registry.register(tmp_path / "other", name=NAME, run=run) == version
    assert torch.equal(registry.load(NAME, "champion", run.uri)[0].logits_TB, first.logits_TB)


def test_only_safetensors_and_json_are_stored(store, model, tmp_path):
    run, _, _ = register_one(store, model, tmp_path / "router", "files", seed=5)
    files = run.client.list_artifacts(run.mlflow_run_id, "router")
    assert sorted(file.path for file in files) == ["router/config.json", "router/router.safetensors"]


def test_unknown_names_are_refused_with_what_there_is(store, model, tmp_path):
    run, _, _ = register_one(store, model, tmp_path / "router", "named", seed=6)
    with pytest.raises(ValueError, match=r"registered_model is 'nobody': .* has 'routers'"):
        registry.load("nobody", "champion", run.uri)
    with pytest.raises(ValueError, match=r"alias is 'challenger': .* has 'champion'"):
        registry.load(NAME, "challenger", run.uri)


def test_what_is_no_router_is_not_registered(store, model, tmp_path):
    run = find_or_create("register", "damaged", str(store), {})
    folder = make_artifact(model).save(tmp_path / "router")
    config = json.loads((folder / "config.json").read_text())
    config["threshold"] = 0.0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the folder was altered"):
        registry.register(folder, name=NAME, run=run)
