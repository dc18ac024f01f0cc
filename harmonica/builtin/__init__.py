"""What ships with the code: a real DiT on Fashion-MNIST, its classifier, and a trained router."""

from pathlib import Path

FOLDER = Path(__file__).parent
FASHION_DIT = FOLDER / "fashion-dit"
CLASSIFIER = FOLDER / "classifier"
CHAMPION = FOLDER / "champion"
"""A router trained at length: what `make serve` starts from on a fresh clone."""
