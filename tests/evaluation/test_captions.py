"""Captions of the built-in text-to-image model: what they say, and that it can be read off them again."""

import itertools

import numpy as np
import pytest

from harmonica.evaluation import fashion_mnist
from harmonica.evaluation.fashion_captions import (
    NOUNS,
    TONE_LIMITS,
    all_captions,
    brightness,
    caption,
    is_of_tone,
    meaning,
    plain_caption,
    tone_limits,
    tones,
)


def test_every_class_has_many_captions_and_none_is_anothers():
    meanings = [meaning(text) for text in all_captions()]
    assert len(NOUNS) == len(fashion_mnist.CLASS_NAMES) and len(set(all_captions())) == len(meanings)
    for label, tone in itertools.product(range(len(NOUNS)), (None, "dark", "light")):
        assert meanings.count((label, tone)) >= 8


@pytest.mark.parametrize("tone", [None, "dark", "light"])
def test_drawn_captions_mean_what_they_were_drawn_for(tone):
    rng = np.random.default_rng(0)
    for label in range(len(NOUNS)):
        texts = {caption(label, tone, rng) for _ in range(100)}
        assert len(texts) > 8 and {meaning(text) for text in texts} == {(label, tone)}


def test_drawing_repeats_with_its_seed():
    texts = [[caption(7, "dark", np.random.default_rng(seed)) for _ in range(3)] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_articles():
    assert plain_caption(9) == "a photo of an ankle boot"
    assert plain_caption(9, "light") == "a photo of a light ankle boot"
    assert plain_caption(1, "dark") == "a photo of dark trousers"
    assert plain_caption(3) == "a photo of a dress"


def test_upper_case_is_understood_and_other_captions_are_refused():
    assert meaning("A photo of a dark Coat") == (4, "dark")
    with pytest.raises(ValueError, match="'a photo of a cat' is none of"):
        meaning("a photo of a cat")


def test_brightness_looks_at_the_thing_alone():
    images = np.zeros((3, 1, 28, 28), np.uint8)
    images[0, 0, :2] = 200
    images[1, 0, :20] = 100
    images[1, 0, 20:] = 15  # dark enough to be background
    assert brightness(images).tolist() == [200, 100, 0]


def test_tone_is_relative_to_the_class_and_missing_in_its_middle():
    low, high = np.array(TONE_LIMITS).T
    assert (low < high).all()
    for level, tone, side in ((low - 2, "dark", False), (high + 2, "light", True)):
        images = np.full((10, 1, 28, 28), 0, np.uint8) + level.astype(np.uint8)[:, None, None, None]
        assert tones(images, np.arange(10)) == [tone] * 10
        assert is_of_tone(images, np.arange(10), ["light"] * 10).tolist() == [side] * 10
        assert is_of_tone(images, np.arange(10), ["dark"] * 10).tolist() == [not side] * 10
    middle = np.full((10, 1, 28, 28), 0, np.uint8) + ((low + high) / 2).astype(np.uint8)[:, None, None, None]
    assert tones(middle, np.arange(10)) == [None] * 10


def test_recorded_limits_are_those_of_the_training_images():
    if not fashion_mnist.DEFAULT_FOLDER.exists():
        pytest.skip("wants Fashion-MNIST: install Debian's package dataset-fashion-mnist")
    images, labels = fashion_mnist.load_fashion_mnist("train")
    assert tone_limits(images, labels) == TONE_LIMITS
    found = tones(images, labels)
    assert [round(found.count(tone) / len(found), 2) for tone in ("dark", "light", None)] == [0.33] * 3
