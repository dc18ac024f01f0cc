"""Models from an object store (moto over HTTP): copied once, kept in a cache, and no secret shown."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fetching import BUCKET, names, upload
from tiny_dit import write_model
from tiny_pipeline import write_pipeline

from harmonica.builtin import FASHION_DIT
from harmonica.io import object_store
from harmonica.io.object_store import cache_folder
from harmonica.io.paths import without_secrets
from harmonica.io.resolve import local_path
from harmonica.models.loading import ModelConfig, load_model


@pytest.fixture
def copies(monkeypatch):
    """Counts how often something is really copied from the store."""
    counted, copy = [], object_store._copy

    def counting(*arguments: object) -> None:
        counted.append(threading.get_ident())
        copy(*arguments)

    monkeypatch.setattr(object_store, "_copy", counting)
    return counted


def test_what_is_local_is_taken_as_it_is(tmp_path, monkeypatch):
    assert local_path("builtin:fashion-dit") == FASHION_DIT
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert local_path("org/name") == tmp_path / "org" / "name"  # though it could be an id of the hub
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/org") == tmp_path / "org"


def test_the_cache_is_where_it_is_said_to_be(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("HARMONICA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path("/home/me/.cache/harmonica")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/harmonica")
    monkeypatch.setenv("HARMONICA_CACHE", "/mine")
    assert cache_folder() == Path("/mine")


def test_a_model_folder_in_a_bucket_loads_and_is_copied_once(s3, uri, copies, tmp_path):
    write_model(tmp_path / "model")
    upload(s3, tmp_path / "model", "a/model")
    first = load_model(ModelConfig(path=uri("a/model")))
    assert (
        first.model.fingerprint() == load_model(ModelConfig(path=str(tmp_path / "model"))).model.fingerprint()
    )
    assert first.class_names[9] == "Ankle boot"
    load_model(ModelConfig(path=uri("a/model/")))
    assert len(copies) == 1


def test_of_a_pipeline_only_what_loading_needs_is_copied(s3, uri, tmp_path):
    folder = write_pipeline(tmp_path / "pipeline")
    for name in ("README.md", "transformer/diffusion_pytorch_model.bin", "safety_checker/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not needed")
    upload(s3, folder, "pipeline")
    found = local_path(uri("pipeline"))
    assert names(found) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    loaded = load_model(ModelConfig(path=uri("pipeline")))
    assert loaded.vae_folder == found / "vae"
    assert loaded.load_vae() is not None


def test_a_changed_object_is_fetched_anew(s3, uri, copies):
    s3.put_object(Bucket=BUCKET, Key="dit.pt", Body=b"one")
    first = local_path(uri("dit.pt"))
    s3.put_object(Bucket=BUCKET, Key="dit.pt", Body=b"three")
    second = local_path(uri("dit.pt"))
    assert (first.name, second.name) == ("dit.pt", "dit.pt")
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"three")  # a running model keeps its file
    assert len(copies) == 2


def test_loaders_at_the_same_time_share_one_copy(s3, uri, copies):
    s3.put_object(Bucket=BUCKET, Key="dit.pt", Body=b"x" * 100_000)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(local_path, [uri("dit.pt")] * 4))
    assert len(found) == len(copies) == 1
    assert found.pop().stat().st_size == 100_000


def test_a_broken_copy_is_never_seen(s3, uri, monkeypatch):
    s3.put_object(Bucket=BUCKET, Key="dit.pt", Body=b"x" * 1000)

    def cut(source, sink, _):
        sink.write(source.read(10))

    with monkeypatch.context() as patch:
        patch.setattr(object_store.shutil, "copyfileobj", cut)
        with pytest.raises(
            ValueError, match=r"cannot be fetched \(OSError: dit.pt changed while it was read"
        ):
            local_path(uri("dit.pt"))
    assert [path.suffix for path in cache_folder().iterdir()] == [".lock"]
    assert local_path(uri("dit.pt")).stat().st_size == 1000


def test_credentials_are_never_shown(s3, uri, caplog, tmp_path):
    caplog.set_level("DEBUG", logger="harmonica")
    s3.put_object(Bucket=BUCKET, Key="dit.pt", Body=b"x")
    local_path(uri("dit.pt"))
    said = [caplog.text, *names(cache_folder())]
    bad = (
        uri("none.pt"),
        uri("a b.pt"),  # pyarrow quotes the whole of a URI that it cannot parse
        uri("dit.pt") + "&bogus=1",
        uri("dit.pt").replace("scheme=http&", "scheme=&secret_key=hush&"),
        uri("dit.pt").replace("s3://", "ftp://"),
    )
    for path in bad:
        with pytest.raises(ValueError) as caught:
            local_path(path)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
        said.append(str(caught.value))
    assert "hush" not in "".join(said)
    assert f"s3://{BUCKET}/dit.pt" in caplog.text
    assert without_secrets("s3://a:b@c/d?token=e&region=f") == "s3://c/d?region=f"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/none", r"model.path /none does not exist: give builtin:fashion-dit, a model folder"),
        ("a/b/c", r"model.path a/b/c does not exist"),
        ("ftp://a/b", r"model.path ftp://a/b is of an unknown kind, ftp: give a local path"),
        ("org/name", r"org/name is no local path, so a Hugging Face id, and its revision is '': give the "),
    ],
)
def test_what_is_not_there_says_what_to_give(path, words):
    with pytest.raises(ValueError, match=words):
        local_path(path)


def test_a_bucket_without_a_model_says_so(s3, uri):
    s3.put_object(Bucket=BUCKET, Key="other/notes.txt", Body=b"x")
    with pytest.raises(
        ValueError, match=r"model.path s3://models/other.* holds no model: give a model folder"
    ):
        local_path(uri("other"))
    with pytest.raises(
        ValueError, match=r"model.vae s3://models/none.* cannot be fetched \(FileNotFoundError"
    ):
        local_path(uri("none"), field="model.vae")
    assert not cache_folder().exists()


def test_a_remote_folder_is_looked_at_once(s3, uri, monkeypatch, tmp_path):
    """Reading and loading ask for the path once: each asks the store for all names."""
    write_model(tmp_path / "model")
    upload(s3, tmp_path / "model", "model")
    asked, look = [], object_store._fetch
    monkeypatch.setattr(object_store, "_fetch", lambda *of: (asked.append(of), look(*of))[1])
    load_model(ModelConfig(path=uri("model")))
    assert len(asked) == 1


def test_a_bucket_s_only_checkpoint_is_the_model_and_of_several_none(s3, uri):
    s3.put_object(Bucket=BUCKET, Key="one/dit.pt", Body=b"one")
    assert names(local_path(uri("one"))) == ["dit.pt"]
    s3.put_object(Bucket=BUCKET, Key="one/other.pt", Body=b"two")
    with pytest.raises(
        ValueError, match=r"model.path s3://models/one.* several checkpoints, dit.pt, other.pt"
    ):
        local_path(uri("one"))
