"""Rows (index, label, noise): what is trained and judged on, each a pure function of (seed, index).

No images: a row is a class and a starting noise, made where it is used. Which rows form trajectory k is
a function of k and the global batch size, never of the number of workers.
"""

from dataclasses import dataclass

import numpy as np

from harmonica.models.base import BranchedTransformer
from harmonica.noise import row_label, row_noise


@dataclass(frozen=True, slots=True)
class RowSpec:
    """What a row looks like."""

    seed: int
    num_classes: int
    shape: tuple[int, int, int]
    """Of the noise: C, H, W."""

    @classmethod
    def of(cls, model: BranchedTransformer, num_classes: int, seed: int) -> "RowSpec":
        side = model.sample_size
        return cls(seed, num_classes, (model.in_channels, side, side))


@dataclass(frozen=True, slots=True)
class Share:
    """Which rows are one worker's: trajectory k is rows kB ... kB+B-1, split evenly by rank.

    A pure function of k and the global batch size B, so the number of workers changes who makes a row
    and never which rows make a trajectory.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def size(self) -> int:
        """Rows of one trajectory on this worker."""
        return self.batch_size // self.world_size

    def indices(self, positions: np.ndarray, first_trajectory: int) -> np.ndarray:
        """Row index of this worker's 0th, 1st, ... row counted from `first_trajectory`."""
        trajectory = first_trajectory + positions // self.size
        return trajectory * self.batch_size + self.rank * self.size + positions % self.size


def make_rows(indices: np.ndarray, spec: RowSpec) -> dict[str, np.ndarray]:
    """index (n,), label (n,) int64, noise (n, C, H, W) float32."""
    return {
        "index": indices,
        "label": np.array([row_label(spec.seed, int(i), spec.num_classes) for i in indices], np.int64),
        "noise": np.stack([row_noise(spec.seed, int(i), spec.shape) for i in indices]),
    }
