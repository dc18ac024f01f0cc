"""Make samples for training and evaluation: index, label, noise and embedding.

A sample is a pure function of (seed, index), without any image. Its label is a class, or the number of a
prompt in its store. Which samples form trajectory k is a function of k and the global batch size alone, never
of the number of workers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from harmonica.samplers.noise import SampleKeys, sample_label, sample_noise

if TYPE_CHECKING:  # elsewhere where it is needed: processes that only make rows import no torch for it
    import torch

    from harmonica.data.batch import Batch
    from harmonica.data.prompts import PromptStore
    from harmonica.models.base import BranchedTransformer


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Describes a run's samples by seed and shape; pickles prompts as an address."""

    seed: int
    num_classes: int
    """Number of labels to draw from: the model's classes, or the prompts of the store."""
    shape: tuple[int, int, int]
    """Shape (C, H, W) of the noise."""
    prompts: "PromptStore | None" = None
    """The embedded prompts, for a model that takes prompts."""
    pixels: tuple[int, int] | None = None
    """Height and width, for a model that is conditioned on its size."""

    @classmethod
    def of(
        cls, model: "BranchedTransformer", seed: int, prompts: "PromptStore | None" = None
    ) -> "SampleSpec":
        """Return the spec of samples for a model.

        Raises:
            ValueError: a model that takes prompts without any, or with another encoder's.
        """
        shape = (model.in_channels, model.sample_size, model.sample_size)
        if model.num_classes:
            return cls(seed, model.num_classes, shape)
        if prompts is None:
            raise ValueError("prompts.path is '' and the model takes prompts: give a file of prompts")
        prompts.check(*model.text_shape())
        return cls(seed, len(prompts), shape, prompts, model.size_conditioning())

    @property
    def sample_bytes(self) -> int:
        """Return the bytes of a sample in memory."""
        return 4 * math.prod(self.shape) + (self.prompts.row_bytes if self.prompts else 0)

    def make(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the columns of n samples, as `make_samples` does."""
        return make_samples(indices, self)

    def texts(self, labels: np.ndarray) -> list[str] | None:
        """Return the prompts of labels; None where labels are classes."""
        return self.prompts.rows(labels).prompts if self.prompts is not None else None

    def batch_of(self, trajectory: int, shard: "Shard", device: "torch.device | str") -> "Batch":
        """Return the batch of one worker's samples of a trajectory."""
        indices = shard.indices(np.arange(shard.size), trajectory)
        return self.to_batch(self.make(indices), device)

    def with_other_noise(self, offset: int) -> "SampleSpec":
        """Return the spec of other samples of the same shape, at another seed."""
        return replace(self, seed=self.seed + offset)

    def to_batch(self, columns: Mapping[str, Any], device: "torch.device | str") -> "Batch":
        """Return the batch of `make_samples`' columns, numpy's or torch's.

        They are copied, because Ray's batches are read-only.
        """
        import torch

        from harmonica.data.batch import Batch

        noise, label = (torch.as_tensor(np.array(columns[name])).to(device) for name in ("noise", "label"))
        keys = SampleKeys.of(self.seed, [int(i) for i in columns["index"]])
        if self.prompts is None:
            return Batch(noise, label, keys)
        from harmonica.data.prompts import text_condition

        return Batch(noise, text_condition(columns, self.prompts, self.pixels).to(device), keys)


@dataclass(frozen=True, slots=True)
class Shard:
    """Selects the samples of one worker.

    Trajectory k is samples kB ... kB+B-1, split evenly by rank. It depends on k and the global batch size B
    alone, so the number of workers changes which of them makes a sample and never which samples make a
    trajectory.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def size(self) -> int:
        """Return the number of samples of one trajectory on this worker."""
        return self.batch_size // self.world_size

    def indices(self, positions: np.ndarray, first_trajectory: int) -> np.ndarray:
        """Return the indices of this worker's samples at these positions.

        Position 0 is its first sample of `first_trajectory`.
        """
        trajectory = first_trajectory + positions // self.size
        indices: np.ndarray = trajectory * self.batch_size + self.rank * self.size + positions % self.size
        return indices


def make_samples(indices: np.ndarray, spec: SampleSpec) -> dict[str, np.ndarray]:
    """Return columns of n samples, as Ray Data streams them.

    They are index (n,), label (n,) int64, noise (n, C, H, W) float32, and `PromptStore.columns` for text.
    """
    labels = np.array([sample_label(spec.seed, int(i), spec.num_classes) for i in indices], np.int64)
    columns = {
        "index": indices,
        "label": labels,
        "noise": np.stack([sample_noise(spec.seed, int(i), spec.shape) for i in indices]),
    }
    return columns | spec.prompts.columns(labels) if spec.prompts else columns
