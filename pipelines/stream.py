"""Ray Data rows (index, label, noise): streamed, each a pure function of (seed, index).

No images: a row is a class and a starting noise, 3 kB for the built-in model, made where it is used.
"""

from dataclasses import dataclass

import numpy as np
import ray.data

from harmonica.models.base import BranchedTransformer
from harmonica.noise import row_label, row_noise

ROWS_PER_BLOCK = 256
_TASK_CPUS = 0.25  # a row costs microseconds: never let the stream hold a core that trains


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


def stream_rows(
    spec: RowSpec,
    share: Share,
    *,
    first_trajectory: int = 0,
    trajectories: int,
    rows_per_block: int = ROWS_PER_BLOCK,
) -> ray.data.Dataset:
    """This worker's rows of `trajectories` trajectories, in order, streamed."""
    count = trajectories * share.size
    # Order is what makes a trajectory's rows belong together; by default Ray Data gives none.
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True

    def make(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return make_rows(share.indices(batch["id"], first_trajectory), spec)

    blocks = max(1, -(-count // rows_per_block))
    return ray.data.range(count, override_num_blocks=blocks).map_batches(
        make, batch_size=rows_per_block, num_cpus=_TASK_CPUS
    )
