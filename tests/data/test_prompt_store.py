"""Stored prompts: read by row number, refused where they do not fit, and made conditions of."""

import json
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_pixart import apart, make_batch, make_pixart
from tiny_text import TOKENS, WIDTH, make_prompts, write_text_folder
from tolerances import of_pass, rounding, roundoff

from harmonica.data import prompts as prompts_module
from harmonica.data.prompt_files import MANIFEST, part_path
from harmonica.data.prompts import PromptStore, text_condition
from harmonica.data.samples import SampleSpec, make_samples
from harmonica.data.text_encoder import encoder_identity
from harmonica.models.text_condition import TextCondition

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
