"""Embedding prompts on Ray: nothing is made twice, and unfit prompts are refused."""

import dataclasses
import pickle
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from killed_embedding import start_and_kill
from moto.server import ThreadedMotoServer
from tiny_text import LONG, TOKENS, WIDTH, make_prompts, write_store, write_text_folder

from harmonica.data.prompt_files import part_path
from harmonica.data.prompts import PromptStore
from harmonica.data.text_encoder import TextEncoder
from pipelines.data import embed_prompts as pipeline
from pipelines.data.embed_prompts import PromptsConfig, embed_prompts

COUNT, PER_PART = 30, 4
PARTS = 8 + 1
"""Of them, and the negative prompt's."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's tokenizer and text encoder."""
    return write_text_folder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder.load(folder, dtype="float32")


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
