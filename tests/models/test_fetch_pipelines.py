"""Whole pipelines in each form of their files, from an object store and from the hub."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from fetching import REPO, fetch, names, upload
from hub_server import COMMIT, serve_hub
from tiny_pipeline import write_pipeline
from tiny_text import WIDTH, write_sentencepiece
from tiny_text_pipeline import Form, beside_broken, sharded, variant, write_text_pipeline

from harmonica.data.conditions import check_conditions
from harmonica.data.text_encoder import TextEncoder, encoder_identity
from harmonica.io.resolve import local_path
from harmonica.models.loading import ModelConfig, load_model
from harmonica.models.vae import decode_latents

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
