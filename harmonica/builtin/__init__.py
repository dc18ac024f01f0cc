"""What ships with the code: a real DiT and a real PixArt on Fashion-MNIST, a classifier, a trained router."""

from pathlib import Path

FOLDER = Path(__file__).parent
FASHION_DIT = FOLDER / "fashion-dit"
FASHION_PIXART = FOLDER / "fashion-pixart"
CAPTIONS = FOLDER / "captions.txt"
"""Prompts for it, some hundred of `harmonica.captions.all_captions`."""
CLASSIFIER = FOLDER / "classifier"
CHAMPION = FOLDER / "champion"
"""A router trained at length: what `make serve` starts from on a fresh clone."""
