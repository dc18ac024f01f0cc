"""Make captions from Fashion-MNIST: labels as text, and a measured tone.

They are what the built-in text-to-image model was trained on, and how its images are evaluated: every
caption says which class it asks for, and about half of them whether the thing is dark or light.
Shapes: N batch, H W image.
"""

import itertools
from collections.abc import Mapping
from functools import cache
from typing import Literal, get_args

import numpy as np

Tone = Literal["dark", "light"]

NOUNS: tuple[tuple[str, ...], ...] = (
    ("t-shirt", "tee", "short-sleeved top"),
    ("trousers", "pants", "slacks"),
    ("pullover", "sweater", "jumper"),
    ("dress", "frock", "gown"),
    ("coat", "overcoat", "jacket"),
    ("sandal", "open sandal", "summer shoe"),
    ("shirt", "blouse", "button-up shirt"),
    ("sneaker", "trainer", "running shoe"),
    ("bag", "handbag", "purse"),
    ("ankle boot", "boot", "bootie"),
)
"""Nouns of each class, in the order of `harmonica.evaluation.fashion_mnist.CLASS_NAMES`; no two share one."""
TONE_WORDS: Mapping[Tone, tuple[str, ...]] = {"dark": ("dark", "black"), "light": ("light", "white")}
TEMPLATES = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a grey picture of {}",
    "a studio photo of {}",
    "a small photo of {}",
    "a catalogue picture of {}",
    "{} for sale",
)
TONE_LIMITS: tuple[tuple[float, float], ...] = (
    (131.3, 183.4),
    (158.7, 189.5),
    (132.7, 187.8),
    (150.5, 192.0),
    (165.7, 195.2),
    (115.4, 140.9),
    (115.9, 174.0),
    (129.7, 155.3),
    (157.3, 184.2),
    (165.4, 186.2),
)
"""Limits of each class by `brightness`.

A third of the training images is darker than the first, a third lighter than the second; those between have
no tone."""
_FOREGROUND = 16  # grey level: below it is the background


def brightness(images: np.ndarray) -> np.ndarray:
    """Return the foreground's mean grey level (N,), 0 to 255, of (N, 1, H, W) uint8."""
    pixels = images.reshape(len(images), -1)
    is_thing = pixels >= _FOREGROUND
    mean_N: np.ndarray = (pixels * is_thing).sum(axis=1) / np.maximum(is_thing.sum(axis=1), 1)
    return mean_N


def tone_limits(images: np.ndarray, labels: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Compute `TONE_LIMITS` from the training images."""
    light = brightness(images)
    thirds = [np.quantile(light[labels == label], (1 / 3, 2 / 3)) for label in range(len(NOUNS))]
    return tuple((round(float(low), 1), round(float(high), 1)) for low, high in thirds)


def tones(images: np.ndarray, labels: np.ndarray) -> list[Tone | None]:
    """Return the tone of each image within its class; None in the middle third."""
    low, high = np.array(TONE_LIMITS)[labels].T
    light = brightness(images)
    return ["dark" if x < a else "light" if x > b else None for x, a, b in zip(light, low, high)]


def is_of_tone(images: np.ndarray, labels: np.ndarray, asked: list[Tone]) -> np.ndarray:
    """Return whether each image is on its tone's side of its class's middle.

    By chance, half of them are.
    """
    middle = np.array(TONE_LIMITS)[labels].mean(axis=1)
    matches_N: np.ndarray = (brightness(images) > middle) == np.array([tone == "light" for tone in asked])
    return matches_N


def _phrase(template: str, noun: str, tone_word: str) -> str:
    thing = f"{tone_word} {noun}".strip()
    is_plural = noun.endswith("s") and not noun.endswith("ss")
    article = "" if is_plural else "an " if thing[0] in "aeiou" else "a "
    return template.format(article + thing)


@cache
def _meanings() -> dict[str, tuple[int, Tone | None]]:
    meanings: dict[str, tuple[int, Tone | None]] = {}
    said: list[tuple[Tone | None, str]] = [(None, "")]
    said += [(tone, word) for tone in get_args(Tone) for word in TONE_WORDS[tone]]
    for label, nouns in enumerate(NOUNS):
        for template, noun, (tone, word) in itertools.product(TEMPLATES, nouns, said):
            meanings[_phrase(template, noun, word)] = (label, tone)
    return meanings


def all_captions() -> list[str]:
    """Return every caption, each once."""
    return list(_meanings())


def meaning(caption: str) -> tuple[int, Tone | None]:
    """Return the class and tone that a caption asks for.

    Raises:
        ValueError: it is none of `all_captions`.
    """
    try:
        return _meanings()[caption.lower()]
    except KeyError:
        raise ValueError(
            f"caption {caption!r} is none of harmonica.evaluation.fashion_captions.all_captions(): "
            "only those can be evaluated"
        ) from None


def plain_caption(label: int, tone: Tone | None = None) -> str:
    """Return a caption with the class's first noun: `a photo of a dark coat`."""
    return _phrase("a photo of {}", NOUNS[label][0], "" if tone is None else TONE_WORDS[tone][0])


def caption(label: int, tone: Tone | None, rng: np.random.Generator) -> str:
    """Draw one of the class's captions; it names the tone if one is given."""
    nouns = NOUNS[label]
    word = "" if tone is None else TONE_WORDS[tone][rng.integers(len(TONE_WORDS[tone]))]
    noun, template = nouns[rng.integers(len(nouns))], TEMPLATES[rng.integers(len(TEMPLATES))]
    return _phrase(template, noun, word)
