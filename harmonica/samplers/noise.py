"""Counter-based noise and labels.

Every draw is a pure function of (seed, row index, step).

Any worker, in any order, on any retry makes the same row, because Philox is addressed by counter
instead of advanced by drawing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_SEED = 2**63 - 1
_LABEL_STREAM, _NOISE_STREAM, _STEP_STREAM = 0, 1, 2


def _generator(seed: int, stream: int, index: int, step: int = 0) -> np.random.Generator:
    # The lowest counter word is what drawing advances; the others name the row and its step.
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, step, stream, index]))


def sample_label(seed: int, index: int, num_classes: int) -> int:
    """Draw the class of row `index`, uniform over `num_classes`."""
    return int(_generator(seed, _LABEL_STREAM, index).integers(num_classes))


def sample_noise(seed: int, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draw the standard normal noise of row `index`, float32, e.g. (C, H, W).

    Sampling of the row starts from it.
    """
    return _generator(seed, _NOISE_STREAM, index).standard_normal(shape, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class SampleKeys:
    """The keys (seed, index) of a batch's rows.

    A stochastic sampler draws the rows' noise from them.
    """

    seeds: Sequence[int]
    indices: Sequence[int]

    @classmethod
    def of(cls, seed: int, indices: Sequence[int]) -> "SampleKeys":
        """Return the keys of rows of one seed."""
        return cls((seed,) * len(indices), tuple(map(int, indices)))

    def __getitem__(self, part: slice) -> "SampleKeys":
        return SampleKeys(self.seeds[part], self.indices[part])

    def start_noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """Draw the noise that the rows start from, (N, *shape) float32."""
        return np.stack(
            [sample_noise(seed, i, shape) for seed, i in zip(self.seeds, self.indices, strict=True)]
        )

    def step_noise(self, step: int, shape: tuple[int, ...]) -> np.ndarray:
        """Draw the standard normal noise of one denoising step, (N, *shape) float32."""
        keys = zip(self.seeds, self.indices, strict=True)
        generators = (_generator(seed, _STEP_STREAM, index, step) for seed, index in keys)
        return np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in generators])
