"""Models from an object store (moto over HTTP) and from the hub (its endpoints on loopback), cached."""

import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from hub_server import COMMIT, serve_hub
from moto.server import ThreadedMotoServer
from tiny_dit import write_model
from tiny_pipeline import write_pipeline
from tiny_text import WIDTH, write_sentencepiece
from tiny_text_pipeline import Form, beside_broken, sharded, variant, write_text_pipeline

from harmonica.builtin import FASHION_DIT
from harmonica.data.conditions import check_conditions
from harmonica.data.text_encoder import TextEncoder, encoder_identity
from harmonica.io import object_store
from harmonica.io.object_store import cache_folder
from harmonica.io.paths import without_secrets
from harmonica.io.resolve import local_path, pinned
from harmonica.models.loading import ModelConfig, load_model
from harmonica.models.vae import decode_latents

BUCKET, REPO = "models", "org/tiny-dit"
SECRET = "hush+hush/hush"


@pytest.fixture(scope="module")
def s3_endpoint():
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint, monkeypatch, tmp_path):
    """A client, with its bucket empty and a cache of our own."""
    monkeypatch.setenv("HARMONICA_CACHE", str(tmp_path / "cache"))
    keys = {"aws_access_key_id": "id", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{s3_endpoint}", **keys)
    client.create_bucket(Bucket=BUCKET)
    yield client
    for found in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=found["Key"])


@pytest.fixture
def uri(s3_endpoint):
    """The URI of a key, with the credentials in it as pyarrow takes them."""

    def make(key: str) -> str:
        secret = SECRET.replace("+", "%2B").replace("/", "%2F")
        where = f"scheme=http&endpoint_override={s3_endpoint}&region=us-east-1"
        return f"s3://id:{secret}@{BUCKET}/{key}?{where}"

    return make


def upload(s3, folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(folder).as_posix()}"
            s3.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


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


FORMS: dict[str, Form] = {
    "plain": lambda folder: None,
    "shards": sharded(),
    "fp16": variant("fp16"),
    "bf16 shards": variant("bf16", max_shard_size="8KB"),
    "both": beside_broken("fp16"),
}


@pytest.fixture(params=FORMS)
def text_repository(request, tmp_path) -> Path:
    """A text pipeline in one of the forms, what nobody needs beside it, and a tokenizer in sentencepiece."""
    folder = write_text_pipeline(tmp_path / "repository")
    FORMS[request.param](folder)
    write_sentencepiece(folder / "tokenizer")
    for name in ("README.md", "safety_checker/model.safetensors", "text_encoder/tf_model.h5"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    return folder


def check_whole(found: Path, repository: Path) -> None:
    """Model, decoder and text encoder load from what was fetched, and are those of the repository."""
    assert names(found) == [
        name
        for name in names(repository)
        if not ({"README", "safety_checker", "tf_model"} & set(re.split("[./]", name)))
        and not (repository / name).read_bytes().startswith(b"not read")
    ]
    ours, theirs = (load_model(ModelConfig(path=str(path), text_tokens=7)) for path in (found, repository))
    assert ours.model.fingerprint() == theirs.model.fingerprint()
    check_conditions(ours)
    encoder = TextEncoder.load(ours.text_folder, dtype="float32")
    embeddings, mask = encoder.encode(["moon"], 7)
    assert embeddings.shape == (1, 7, WIDTH) and 1 < int(mask.sum()) < 7
    assert encoder.identity(7) == encoder_identity(repository, 7)
    assert decode_latents(ours.load_vae(), torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)


def test_a_text_pipeline_in_a_bucket_brings_all_its_parts(s3, uri, text_repository):
    upload(s3, text_repository, "pixart")
    check_whole(local_path(uri("pixart")), text_repository)


def test_a_text_pipeline_of_the_hub_brings_all_its_parts(text_repository, tmp_path):
    with serve_hub(REPO, text_repository) as hub:
        found, said = fetch(tmp_path / "hf", hub.endpoint, REPO, COMMIT)
        assert found, said
    check_whole(Path(found), text_repository)


@pytest.mark.parametrize("how", [{"variant": "fp16"}, {"variant": "bf16", "max_shard_size": "40KB"}])
def test_a_class_pipeline_s_variant_loads_from_hub_and_bucket(s3, uri, tmp_path, how):
    folder = write_pipeline(tmp_path / "repository")
    for part, kind in (("transformer", DiTTransformer2DModel), ("vae", AutoencoderKL)):
        one = kind.from_pretrained(folder / part, low_cpu_mem_usage=False)
        shutil.rmtree(folder / part)
        one.save_pretrained(folder / part, **how)
    upload(s3, folder, "dit")
    with serve_hub(REPO, folder) as hub:
        found, said = fetch(tmp_path / "hf", hub.endpoint, REPO, COMMIT)
        assert found, said
    fingerprints = []
    for path in (folder, Path(found), local_path(uri("dit"))):
        assert names(path) == names(folder)
        loaded = load_model(ModelConfig(path=str(path)))
        fingerprints.append(loaded.model.fingerprint())
        assert loaded.load_vae() is not None
    assert fingerprints[1:] == fingerprints[:1] * 2


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


FETCH = "import sys; from harmonica.io.resolve import local_path; print(local_path(*sys.argv[1:]))"


def fetch(cache: Path, endpoint: str, *arguments: str, offline: bool = False):
    """`local_path` in a new process, as huggingface_hub reads its environment once."""
    environment = os.environ | {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", FETCH, *arguments], env=environment, capture_output=True, text=True
    )
    return result.stdout.strip(), result.stderr


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


def test_what_the_hub_does_not_have_says_what_to_check(repository, tmp_path):
    with serve_hub(REPO, repository) as hub:
        _, said = fetch(tmp_path / "hf", hub.endpoint, REPO, "v9")
        assert f"ValueError: model.path {REPO} at v9 is not in {tmp_path}/hf/hub (RevisionNotFound" in said
        assert "check id, revision, access and network, or give a local folder" in said
        _, said = fetch(tmp_path / "hf", hub.endpoint, REPO, COMMIT, offline=True)
        assert f"at {COMMIT} is not in {tmp_path}/hf/hub, and HF_HUB_OFFLINE forbids to fetch it" in said
        assert hub.requests[-1].endswith("v9")
