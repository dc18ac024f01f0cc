"""Embedded prompts as a batch: picked, joined, moved, doubled for guidance, and refused where unfit."""

import pytest
import torch
from tiny_pixart import make_batch, make_pixart

from harmonica.models.text_condition import TextCondition


@pytest.fixture
def condition() -> TextCondition:
    """Three rows with every field."""
    return make_batch("alpha 1024")[1]


def prompts(n: int, tokens: int = 7, width: int = 10, **more) -> TextCondition:
    return TextCondition(
        embeddings=torch.ones(n, tokens, width), mask=torch.ones(n, tokens, dtype=torch.bool), **more
    )


@pytest.mark.parametrize("rows", [[2, 0], torch.tensor([2, 0]), slice(1, 3)], ids=["list", "tensor", "slice"])
def test_rows_are_picked_from_every_field(condition, rows):
    picked = condition[rows]
    assert len(picked) == 2
    for name in condition.__slots__:
        assert torch.equal(getattr(picked, name), getattr(condition, name)[rows])


def test_batches_are_joined_in_order(condition):
    again = TextCondition.concatenate([condition[:1], condition[1:]])
    for name in condition.__slots__:
        assert torch.equal(getattr(again, name), getattr(condition, name))
    assert TextCondition.concatenate([prompts(1), prompts(2)]).resolution is None


def test_only_embeddings_take_a_precision(condition):
    half = condition.to("cpu", torch.bfloat16)
    for name in condition.__slots__:
        wanted = torch.bfloat16 if name.endswith("embeddings") else getattr(condition, name).dtype
        assert getattr(half, name).dtype == wanted
    assert condition.to("meta").negative_mask.device.type == "meta"


def test_guided_rows_are_conditional_then_negative(condition):
    twins = make_pixart("alpha 1024").guided_condition(condition)
    assert len(twins) == 6 and twins.negative_embeddings is None
    for name in ("embeddings", "mask"):
        halves = getattr(condition, name), getattr(condition, f"negative_{name}")
        assert torch.equal(getattr(twins, name), torch.cat(halves))
    for name in ("resolution", "aspect_ratio"):
        assert torch.equal(getattr(twins, name), getattr(condition, name).repeat(2, 1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: prompts(3)[0], r"condition.embeddings has shape \(7, 10\): give \(N, S, C\)"),
        (
            lambda: TextCondition(embeddings=torch.ones(3, 7, 10), mask=torch.ones(2, 7) > 0),
            r"condition.mask has shape \(2, 7\): give \(3, 7\)",
        ),
        (
            lambda: TextCondition(embeddings=torch.ones(3, 7, 10), mask=torch.ones(3, 7)),
            "condition.mask is torch.float32: give bool",
        ),
        (lambda: prompts(3, aspect_ratio=torch.ones(3, 1)), "one of resolution and aspect_ratio: give both"),
        (
            lambda: prompts(3, negative_embeddings=torch.ones(1, 7, 10)),
            r"condition.negative_embeddings has shape \(1, 7, 10\): give \(3, 7, 10\)",
        ),
        (
            lambda: prompts(3, negative_embeddings=torch.ones(3, 7, 10)),
            "one of negative_embeddings and negative_mask: give both",
        ),
        (lambda: prompts(3).guided(), "condition.negative_embeddings is None and the sampler guides"),
        (
            lambda: TextCondition.concatenate([prompts(1), make_batch("sigma")[1]]),
            "condition.negative_embeddings is None in some batches",
        ),
        (
            lambda: TextCondition.concatenate([prompts(1), prompts(1, tokens=5)]),
            r"condition.embeddings has rows of \(7, 10\), \(5, 10\): pad all prompts",
        ),
        (lambda: make_pixart("alpha 1024").project(prompts(1)), "condition.resolution is None and the model"),
        (
            lambda: make_pixart("alpha").project(prompts(1, width=16)),
            "condition.embeddings has width 16 and the model takes 10",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
