"""Prompts: embedded as diffusers does, stored, read by row number, and made anew only where missing."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from moto.server import ThreadedMotoServer
from tiny_pipeline import make_vae
from tiny_pixart import apart, make_batch, make_pixart, pipeline_class
from tiny_text import (
    TOKENS,
    WIDTH,
    WORDS,
    make_prompts,
    make_tokenizer,
    write_store,
    write_text_folder,
)
from tolerances import of_pass, rounding, roundoff

from harmonica.data import prompts as prompts_module
from harmonica.data.prompt_files import MANIFEST, part_path, stored_parts
from harmonica.data.prompts import PromptStore, text_condition
from harmonica.data.samples import SampleSpec, make_samples
from harmonica.data.text_encoder import TextEncoder, encoder_identity, preprocess
from harmonica.models.text_condition import TextCondition
from pipelines.data import embed_prompts as pipeline
from pipelines.data.embed_prompts import PromptsConfig, embed_prompts

LONG = "a red cat on the moon near a blue dog"  # ten tokens and the end


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


# The encoder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "tokens"), [("alpha", None), ("sigma", None), ("sigma", TOKENS)])
def test_prompts_are_embedded_as_by_diffusers(folder, name, tokens, dtype):
    ours = TextEncoder.load(folder, dtype=dtype)
    pipe = pipeline_class(name)(
        tokenizer=ours.tokenizer, text_encoder=ours.model, vae=make_vae(), transformer=None, scheduler=None
    )
    limit = {} if tokens is None else {"max_sequence_length": tokens}
    prompts = ["A RED cat ", "\tblue\n", LONG]
    theirs, mask, negative, negative_mask = pipe.encode_prompt(prompts, device="cpu", **limit)
    max_tokens = tokens or {"alpha": 120, "sigma": 300}[name]
    assert [preprocess(prompt) for prompt in prompts] == pipe._text_preprocessing(prompts)
    for texts, expected, expected_mask in (
        (prompts, theirs, mask),
        (["", "", ""], negative, negative_mask),
    ):
        embeddings, found = ours.encode(texts, max_tokens)
        assert embeddings.shape == (3, max_tokens, WIDTH) and embeddings.dtype == getattr(torch, dtype)
        assert torch.equal(embeddings, expected) and torch.equal(found, expected_mask.bool())


def test_what_is_too_long_is_cut_with_one_warning_or_refused(encoder, caplog):
    fitting = "a red cat on the moon"  # six tokens and the end
    encoder.encode([fitting, "dog"], TOKENS, "refuse")
    assert not caplog.records
    _, mask = encoder.encode([fitting, LONG, f"{LONG} {LONG}"], TOKENS)
    assert mask.all()
    words = f"2 of 3 prompts have more than 7 tokens, the first 11: '{LONG}'"
    assert [record.getMessage() for record in caplog.records] == [f"{words}; they lose their end"]
    with pytest.raises(ValueError, match=f"{words}: shorten them, or set prompts.over_limit to truncate"):
        encoder.encode([fitting, LONG, f"{LONG} {LONG}"], TOKENS, "refuse")
    with pytest.raises(ValueError, match=r"prompts is \[\]"):
        encoder.encode([], TOKENS)


def test_an_encoder_is_known_by_its_weights_and_tokenizer_however_they_are_stored(folder, encoder, tmp_path):
    ours = encoder.identity(TOKENS)
    assert ours == encoder_identity(folder, TOKENS)
    assert TextEncoder.load(folder, dtype="bfloat16").identity(TOKENS) == ours
    other = write_text_folder(tmp_path / "sharded")
    encoder.model.save_pretrained(other / "text_encoder", max_shard_size="2KB")
    (other / "text_encoder" / "model.safetensors").unlink()
    assert len(list((other / "text_encoder").glob("*.safetensors"))) > 1
    assert encoder_identity(other, TOKENS) == ours
    state = encoder.model.state_dict()
    bare = write_text_folder(tmp_path / "bare")
    (bare / "text_encoder" / "model.safetensors").unlink()
    torch.save(
        state | {"decoder.final_layer_norm.weight": torch.ones(2)}, bare / "text_encoder/pytorch_model.bin"
    )
    assert "encoder.embed_tokens.weight" in state and encoder_identity(bare, TOKENS) == ours

    def differing(identity):
        return [name for name in ours if identity[name] != ours[name]]

    assert differing(encoder.identity(9)) == ["max_tokens"]
    assert differing(encoder_identity(write_text_folder(tmp_path / "seed", seed=1), TOKENS)) == ["weights"]
    for words in (WORDS[:3], [word.replace("moon", "noon") for word in WORDS]):
        make_tokenizer(words).save_pretrained(other / "tokenizer")
        assert differing(encoder_identity(other, TOKENS)) == ["tokenizer"]


def without_weights(folder):
    (folder / "text_encoder" / "model.safetensors").unlink()


def of_another_kind(folder):
    (folder / "text_encoder" / "config.json").write_text('{"model_type": "clip_text_model"}')


def without_tokenizer(folder):
    (folder / "tokenizer").rename(folder / "tokenizer_2")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_weights, "has no model.safetensors or pytorch_model.bin"),
        (of_another_kind, "has a text_encoder of type clip_text_model: give a PixArt's, a T5"),
        (without_tokenizer, "no tokenizer/tokenizer_config.json; it holds text_encoder, tokenizer_2: give"),
    ],
)
def test_a_folder_without_a_text_encoder_is_refused(tmp_path, spoil, words):
    spoil(write_text_folder(tmp_path))
    for load in (TextEncoder.load, lambda path: encoder_identity(path, TOKENS)):
        with pytest.raises(ValueError, match=words):
            load(tmp_path)


# The store


@pytest.mark.parametrize("open_parts", [1, 16])
def test_rows_are_what_was_embedded_without_padding(store, encoder, open_parts, monkeypatch):
    monkeypatch.setattr(prompts_module, "_OPEN_PARTS", open_parts)
    prompts = make_prompts(10)
    expected, mask = encoder.encode(prompts, TOKENS)
    assert len(store) == 10 and len({int(n) for n in mask.sum(1)}) > 1
    wanted = [9, 0, 4, 4, 3]  # of all parts, backwards, one twice
    found = store.rows(wanted)
    assert found.prompts == [prompts[i] for i in wanted]
    assert torch.equal(found.mask, mask[wanted])
    padded = expected.bfloat16() * mask[..., None]
    # Other batches were embedded, so a number may have been rounded to its neighbour.
    near = {"rtol": 2 * roundoff(torch.bfloat16), "atol": of_pass(torch.float32)}
    torch.testing.assert_close(found.embeddings, padded[wanted], **near)
    embedding, row_mask, prompt = store.row(7)
    torch.testing.assert_close(embedding, padded[7], **near)
    assert torch.equal(row_mask, mask[7]) and prompt == prompts[7]
    negative, negative_mask = store.negative()
    empty, empty_mask = encoder.encode([""], TOKENS)
    torch.testing.assert_close(negative, empty.bfloat16() * empty_mask[..., None], **near)
    assert torch.equal(negative_mask, empty_mask) and negative_mask.sum() == 1
    assert store.rows([]).embeddings.shape == (0, TOKENS, WIDTH)


def test_a_row_is_read_without_its_neighbours(store, tmp_path):
    parts = store.manifest.parts
    for name, rows in parts:
        assert pq.ParquetFile(tmp_path / "store" / part_path(name)).metadata.num_row_groups == rows
    for name, _ in parts[1:]:
        (tmp_path / "store" / part_path(name)).unlink()
    again = PromptStore(tmp_path / "store")
    assert again.row(3)[2] == make_prompts(10)[3]
    with pytest.raises(
        ValueError, match=r"no readable parts/part-4.parquet \(FileNotFoundError\): delete it"
    ):
        again.row(4)


def test_a_store_travels_as_its_address(store, tmp_path):
    sent = pickle.dumps(store)
    assert len(sent) < 500
    assert torch.equal(pickle.loads(sent).rows([5]).embeddings, store.rows([5]).embeddings)
    path = tmp_path / "store" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncated": 1}))
    with pytest.raises(ValueError, match=r"is sha256:\w+ and was sha256:\w+: keep each store in a folder"):
        pickle.loads(sent)


def test_bytes_of_a_row(store):
    tokens = sum(len(prompt.split()) + len(prompt.split()[-1]) + 1 for prompt in make_prompts(10))
    assert store.mean_stored_bytes == 2 * WIDTH * tokens / 10
    columns = store.columns([0])
    assert store.row_bytes == sum(column.nbytes for column in columns.values()) == TOKENS * (2 * WIDTH + 1)


def test_a_store_is_refused_where_it_does_not_fit(store, encoder, tmp_path):
    store.check(WIDTH, TOKENS)
    store.check(WIDTH, TOKENS, encoder.identity(TOKENS))
    with pytest.raises(
        ValueError, match="has width 10 and the model 4096: embed the prompts with the model's"
    ):
        store.check(4096, TOKENS)
    with pytest.raises(ValueError, match="has max_tokens 7 and the model 300: embed"):
        store.check(WIDTH, 300, encoder.identity(300))
    other = encoder_identity(write_text_folder(tmp_path / "other", seed=1), TOKENS)
    with pytest.raises(ValueError, match=r"has weights sha256:\w+ and the model sha256:\w+: embed"):
        store.check(WIDTH, TOKENS, other)


@pytest.mark.parametrize("index", [-1, 10])
def test_there_is_no_other_row(store, index):
    with pytest.raises(ValueError, match=f"has no row {index}: give 0 to 9"):
        store.rows([0, index])


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (
            None,
            "has no store.json: give a folder that pipelines.data.embed_prompts wrote, and run that again",
        ),
        ("{", r"has a store.json that cannot be read \(JSONDecodeError\): embed the prompts again"),
        ('{"format": 2}', "has a store.json of another format than 1"),
    ],
)
def test_what_is_no_store_is_refused(store, tmp_path, manifest, words):
    path = tmp_path / "store" / MANIFEST
    path.unlink()
    if manifest is not None:
        path.write_text(manifest)
    with pytest.raises(ValueError, match=words):
        PromptStore(tmp_path / "store")


def test_a_damaged_part_is_said(store, tmp_path):
    path = tmp_path / "store" / part_path("part-4")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"no readable parts/part-4.parquet \(ArrowInvalid\)"):
        PromptStore(tmp_path / "store").row(4)


# What is trained on


def test_the_model_cannot_tell_stored_prompts_from_fresh_ones(store, encoder):
    """Padding comes back as zeros; the encoder has something else there, but nobody looks."""
    model, (noise, _) = make_pixart("alpha"), make_batch("alpha")
    columns = make_samples(np.arange(3), SampleSpec(0, len(store), (4, 8, 8)))
    columns |= store.columns(columns["label"])
    ours = text_condition(columns, store).to(dtype=torch.float64)
    prompts = [store.row(label)[2] for label in columns["label"]]
    fresh, mask = encoder.encode(prompts, TOKENS)
    negative, negative_mask = encoder.encode([""] * 3, TOKENS)
    theirs = TextCondition(
        embeddings=fresh.bfloat16(),
        mask=mask,
        negative_embeddings=negative.bfloat16(),
        negative_mask=negative_mask,
    ).to(dtype=torch.float64)
    assert not torch.equal(ours.embeddings, theirs.embeddings) and len(set(prompts)) > 1
    timestep = torch.full((6,), 500)
    images = [model(noise.repeat(2, 1, 1, 1), timestep, condition.guided()) for condition in (ours, theirs)]
    assert apart(*images) < rounding(torch.bfloat16, 1), "but for numbers that were rounded to a neighbour"
    assert apart(images[0][:3], images[0][3:]) > 0.1


def test_a_condition_is_made_of_streamed_columns_wherever_they_are(store):
    columns = store.columns([1, 8])
    for column in columns.values():
        column.setflags(write=False)  # as Ray's
    plain = text_condition(columns, store)
    assert plain.resolution is None and plain.embeddings.dtype == torch.bfloat16
    assert torch.equal(plain.embeddings, store.rows([1, 8]).embeddings)
    told = text_condition({name: torch.tensor(c) for name, c in columns.items()}, store, pixels=(1024, 512))
    assert torch.equal(told.embeddings, plain.embeddings) and torch.equal(told.mask, plain.mask)
    assert told.resolution.tolist() == [[1024, 512]] * 2 and told.aspect_ratio.tolist() == [[2], [2]]
    assert torch.equal(told.negative_embeddings[1:], store.negative()[0])


# The pipeline

COUNT, PER_PART = 30, 4
PARTS = 8 + 1
"""Of them, and the negative prompt's."""

DRIVER = """
import os, sys, time
from pathlib import Path
from pipelines.data import embed_prompts as pipeline
from pipelines.runtime.private_cluster import on_loopback
from pipelines.runtime.ray_runtime import connect

text, folder, out, rows, pids = sys.argv[1:]

class Slow(pipeline.PartEmbedder):
    def __init__(self, *arguments, **named):
        (Path(pids) / str(os.getpid())).touch()
        super().__init__(*arguments, **named)

    def __call__(self, table):
        time.sleep(1)
        return super().__call__(table)

pipeline.PartEmbedder, pipeline.ROWS_PER_PART = Slow, int(rows)
with on_loopback():  # where a private cluster is
    connect()
pipeline.embed_prompts(pipeline.PromptsConfig(path=text, column="text", max_tokens=7), folder, out)
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Parquet with all of `make_prompts`, in order, and what is to be left out."""
    folder, prompts = tmp_path_factory.mktemp("texts"), make_prompts(COUNT)
    written = {
        "c/2.parquet": prompts[20:] + prompts[5:8],
        "b.parquet": [prompts[3], "  ", *prompts[10:20]],
        "a.parquet": ["", prompts[0].upper(), None, *prompts[:10], f" {prompts[1]}\n"],
    }
    for name, column in written.items():
        (folder / name).parent.mkdir(exist_ok=True)
        table = pa.table({"n": range(len(column)), "text": column})
        pq.write_table(table, folder / name, row_group_size=3)
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(pipeline, "ROWS_PER_PART", PER_PART)


@pytest.fixture
def embedded(monkeypatch, tmp_path):
    """Counts the prompts that are embedded, in whichever actor."""
    log = tmp_path / "embedded"
    log.touch()

    class Counting(pipeline.PartEmbedder):
        def __call__(self, table):
            with log.open("a") as file:
                file.write(f"{len(table['prompts'][0])}\n")
            return super().__call__(table)

    monkeypatch.setattr(pipeline, "PartEmbedder", Counting)
    return lambda: [int(line) for line in log.read_text().split()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def start_and_kill(arguments: list[str], out: Path, folder: Path) -> None:
    """Run a driver of this cluster until it has some parts, and kill it as a machine that fails would."""
    pids = folder / "pids"
    pids.mkdir()
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-c", DRIVER, *arguments, str(pids)]
        driver = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + 200
            while len(stored_parts(str(out))) < 2:
                assert driver.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
        finally:
            driver.kill()
            driver.wait()
    while any(Path("/proc", path.name).exists() for path in pids.iterdir()):
        assert time.monotonic() < deadline, "an actor outlived its driver"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(
    private_cluster, folder, encoder, texts, small_parts, embedded, tmp_path
):
    out, whole = tmp_path / "out", tmp_path / "whole"
    start_and_kill([str(texts), str(folder), str(out), str(PER_PART)], out, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (out / "parts").glob("*.parquet")}
    assert 2 <= len(before) < PARTS
    with pytest.raises(
        ValueError, match=r"has no store.json: give a folder that pipelines.data.embed_prompts"
    ):
        PromptStore(out)

    config = PromptsConfig(path=str(texts), column="text", max_tokens=TOKENS)
    store = embed_prompts(config, str(folder), str(out))
    assert len(embedded()) == PARTS - len(before)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    embed_prompts(dataclasses.replace(config, num_actors=2), str(folder), str(whole))
    assert len(embedded()) == PARTS - len(before) + PARTS
    ours = {name: data for name, data in files_of(out).items() if not name.endswith(".tmp")}
    assert ours == files_of(whole) and len(ours) == PARTS + 1

    assert store.rows(range(COUNT)).prompts == make_prompts(COUNT)  # in order, each once
    manifest = store.manifest
    assert (manifest.count, manifest.truncated, manifest.dtype) == (COUNT, 0, "bfloat16")
    store.check(WIDTH, TOKENS, encoder.identity(TOKENS))
    half = TextEncoder.load(folder, dtype="bfloat16")
    expected, mask = half.encode(make_prompts(COUNT)[4:8], TOKENS)
    found = store.rows(range(4, 8))
    assert torch.equal(found.embeddings, expected * mask[..., None]) and torch.equal(found.mask, mask)

    done = len(embedded())
    assert embed_prompts(config, str(folder), str(out)).manifest == manifest
    assert len(embedded()) == done  # nothing is made twice
    with pytest.raises(ValueError, match="out is finished and has another dtype, parts, negative than"):
        embed_prompts(dataclasses.replace(config, dtype="float32"), str(folder), str(out))
    assert len(embedded()) == done


@pytest.mark.cluster
def test_text_and_store_may_lie_in_an_object_store(
    private_cluster, folder, small_parts, embedded, tmp_path, caplog
):
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        endpoint = "{}:{}".format(*server.get_host_and_port())
        keys = {"aws_access_key_id": "id", "aws_secret_access_key": "hush", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=f"http://{endpoint}", **keys)
        client.create_bucket(Bucket="bucket")
        prompts = make_prompts(PER_PART * 2) + [LONG, f"{LONG} 2"]
        text = "\ufeff" + "\r\n".join([*prompts, "", prompts[0]])
        client.put_object(Bucket="bucket", Key="prompts/all.txt", Body=text.encode())

        def uri(key: str) -> str:
            return f"s3://id:hush@bucket/{key}?scheme=http&endpoint_override={endpoint}&region=us-east-1"

        config = PromptsConfig(path=uri("prompts/all.txt"), max_tokens=TOKENS, dtype="float32")
        store = embed_prompts(config, str(folder), uri("made/store"))
        over = f"2 of 10 prompts have more than 7 tokens, the first 11: '{LONG}'"
        assert over in caplog.text and "hush" not in caplog.text + str(store)
        assert pickle.loads(pickle.dumps(store)).rows(range(10)).prompts == prompts
        assert (store.manifest.truncated, embedded()) == (2, [4, 4, 2, 1])

        lost = part_path(store.manifest.parts[1][0])
        client.delete_object(Bucket="bucket", Key=f"made/store/{lost}")
        local = write_store(tmp_path / "local", TextEncoder.load(folder, dtype="float32"), prompts)
        again = embed_prompts(config, str(folder), uri("made/store"))
        assert embedded() == [4, 4, 2, 1, 4]
        assert torch.equal(again.rows(range(8)).mask, local.rows(range(8)).mask)
        torch.testing.assert_close(again.rows(range(10)).embeddings, local.rows(range(10)).embeddings)
        with pytest.raises(ValueError, match=f"prompts.path s3://bucket/prompts/all.txt.*: {over}: shorten"):
            embed_prompts(dataclasses.replace(config, over_limit="refuse"), str(folder), uri("other"))
    finally:
        server.stop()


def in_a_file(text: str):
    def write(folder: Path) -> str:
        (folder / "prompts.txt").write_text(text)
        return str(folder)

    return write


def as_parquet(folder: Path) -> str:
    pq.write_table(pa.table({"n": [1], "caption": ["a cat"]}), folder / "some.parquet")
    return str(folder / "some.parquet")


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("write", "words"),
    [
        (in_a_file("\n  \n"), "prompts.path .* holds no prompts: give at least one line of text"),
        (
            as_parquet,
            r"prompts.column is 'prompt': give a column of text, of n \(int64\), caption \(str",
        ),
        (str, "holds neither .parquet nor .txt: give such a file or a folder of them"),
        (lambda folder: str(folder / "none"), r"none cannot be read \(FileNotFoundError\): give a .txt or"),
        (
            lambda _: "what://is/this",
            "what://is/this is of an unknown kind, what: give a local path",
        ),
        (lambda _: "", "prompts.path is '': give a .txt or .parquet file"),
    ],
)
def test_unfit_prompts_are_refused(private_cluster, folder, tmp_path, write, words):
    (tmp_path / "in").mkdir()
    config = PromptsConfig(path=write(tmp_path / "in"), max_tokens=TOKENS)
    with pytest.raises(ValueError, match=words):
        embed_prompts(config, str(folder), str(tmp_path / "out"))
    assert files_of(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_tokens": 0}, "prompts.max_tokens is 0: give 1 or more"),
        ({"num_actors": 0}, "prompts.num_actors is 0: give 1 or more"),
        ({"over_limit": "drop"}, "prompts.over_limit is 'drop': give truncate or refuse"),
        ({"dtype": "int8"}, "prompts.dtype is 'int8': give one of float32, bfloat16, float16"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        PromptsConfig(**settings)
