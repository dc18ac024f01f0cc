"""Counter-based noise and labels: every row is a pure function of (seed, row index).

Any worker, in any order, on any retry makes the same row, because Philox is addressed by counter
instead of advanced by drawing.
"""

import numpy as np

MAX_SEED = 2**63 - 1
_LABEL_STREAM, _NOISE_STREAM = 0, 1


def _generator(seed: int, stream: int, index: int) -> np.random.Generator:
    # The lowest counter word is what drawing advances; the two highest name the row.
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, stream, index]))


def row_label(seed: int, index: int, num_classes: int) -> int:
    """Class of row `index`, uniform over `num_classes`."""
    return int(_generator(seed, _LABEL_STREAM, index).integers(num_classes))


def row_noise(seed: int, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise of row `index`, float32, e.g. shape (C, H, W)."""
    return _generator(seed, _NOISE_STREAM, index).standard_normal(shape, dtype=np.float32)
