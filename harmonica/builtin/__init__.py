"""What ships with the code: a real DiT and a real PixArt on Fashion-MNIST, a classifier, a trained router."""

from pathlib import Path

FOLDER = Path(__file__).parent
FASHION_DIT = FOLDER / "fashion-dit"
FASHION_PIXART = FOLDER / "fashion-pixart"
CAPTIONS = FOLDER / "captions.txt"
"""Prompts for it: half of `harmonica.evaluation.fashion_captions.all_captions`."""
CLASSIFIER = FOLDER / "classifier"
CHAMPION = FOLDER / "champion"
"""A router for the built-in DiT, which `make serve` starts from on a fresh clone. Its plan was found by a
search over whole steps and its forecasts were fitted; the scores that SDT had trained were discarded, since
their plan was not nearer to the full sampler's images (`training.chosen` in its `config.json`)."""
