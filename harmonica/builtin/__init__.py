"""Locate the models that ship with the code.

They are a DiT and a PixArt of Fashion-MNIST, a DiT of emoji in colour, classifiers of both kinds of
images, and a router for each DiT.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
FASHION_DIT = FOLDER / "fashion-dit"
FASHION_PIXART = FOLDER / "fashion-pixart"
EMOJI_DIT = FOLDER / "emoji-dit"
"""Learned from Noto Emoji (Apache 2.0) and Twemoji (CC BY 4.0), which its `config.json` names."""
CAPTIONS = FOLDER / "captions.txt"
"""Prompts for the PixArt: half of `harmonica.evaluation.fashion_captions.all_captions`."""
CLASSIFIER = FOLDER / "classifier"
"""Of Fashion-MNIST."""
EMOJI_CLASSIFIER = FOLDER / "emoji-classifier"
CHAMPION = FOLDER / "champion"
"""A router for the DiT of Fashion-MNIST, which `make serve` starts from on a fresh clone. Its steps
were learned together with their forecasts, which were then fitted; the scores that SDT had trained were
discarded, since their plan was not nearer to the full sampler's images (`training.chosen` in its
`config.json`)."""
EMOJI_CHAMPION = FOLDER / "emoji-champion"
"""A router for the DiT of emoji, made in the same way."""
