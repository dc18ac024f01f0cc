"""Rows of noise, labels and keys for the tiny DiT, in float64."""

import torch

from harmonica.data.batch import Batch
from harmonica.samplers.noise import SampleKeys


def rows(first: int, count: int = 4) -> Batch:
    """Return the rows from a number on; each is the same in any batch."""
    keys = SampleKeys.of(5, range(first, first + count))
    noise = torch.from_numpy(keys.start_noise((4, 8, 8))).double()
    return Batch(noise, torch.arange(first, first + count) % 10, keys)
