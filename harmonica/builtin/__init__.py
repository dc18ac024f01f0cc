"""Locate the models that ship with the code.

They are a DiT and a PixArt of Fashion-MNIST, a classifier and a trained router.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
FASHION_DIT = FOLDER / "fashion-dit"
FASHION_PIXART = FOLDER / "fashion-pixart"
CAPTIONS = FOLDER / "captions.txt"
"""Prompts for it: half of `harmonica.evaluation.fashion_captions.all_captions`."""
CLASSIFIER = FOLDER / "classifier"
CHAMPION = FOLDER / "champion"
"""A router for the built-in DiT, which `make serve` starts from on a fresh clone. Its steps
were learned together with their forecasts, which were then fitted; the scores that SDT had trained were
discarded, since their plan was not nearer to the full sampler's images (`training.chosen` in its
`config.json`)."""
