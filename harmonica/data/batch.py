"""Rows (index, label, noise, for text also the embedded prompt): what is trained and judged on.

Each is a pure function of (seed, index); no images. The label is a class, or the number of a prompt in its
store. Which rows form trajectory k is a function of k and the global batch size, never of the number of
workers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from harmonica.data.prompts import PromptStore, text_condition
from harmonica.models.base import BranchedTransformer
from harmonica.samplers.noise import SampleKeys, sample_label, sample_noise


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """What a row looks like; pickled, its prompts are an address."""

    seed: int
    num_classes: int
    """Labels to draw from: the model's classes, or the prompts of the store."""
    shape: tuple[int, int, int]
    """Of the noise: C, H, W."""
    prompts: PromptStore | None = None
    """Where the model takes prompts."""
    pixels: tuple[int, int] | None = None
    """Height and width, where the model is told its size."""

    @classmethod
    def of(cls, model: BranchedTransformer, seed: int, prompts: PromptStore | None = None) -> "SampleSpec":
        """Rows for a model.

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
        """Bytes of a sample in memory."""
        return 4 * math.prod(self.shape) + (self.prompts.row_bytes if self.prompts else 0)


@dataclass(frozen=True, slots=True)
class Shard:
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
        indices: np.ndarray = trajectory * self.batch_size + self.rank * self.size + positions % self.size
        return indices


def make_samples(indices: np.ndarray, spec: SampleSpec) -> dict[str, np.ndarray]:
    """index (n,), label (n,) int64, noise (n, C, H, W) float32; for text `PromptStore.columns` too."""
    labels = np.array([sample_label(spec.seed, int(i), spec.num_classes) for i in indices], np.int64)
    rows = {
        "index": indices,
        "label": labels,
        "noise": np.stack([sample_noise(spec.seed, int(i), spec.shape) for i in indices]),
    }
    return rows | spec.prompts.columns(labels) if spec.prompts else rows


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows on the device that samples them."""

    noise_NCHW: torch.Tensor
    condition_N: Any
    """Labels (N,), or a `TextCondition`."""
    keys: SampleKeys

    @classmethod
    def of(cls, rows: Mapping[str, Any], spec: SampleSpec, device: torch.device | str) -> "Batch":
        """From `make_samples`' columns, numpy's or torch's; copied, because Ray's batches are read-only."""
        noise, label = (torch.as_tensor(np.array(rows[name])).to(device) for name in ("noise", "label"))
        keys = SampleKeys.of(spec.seed, [int(i) for i in rows["index"]])
        if spec.prompts is None:
            return cls(noise, label, keys)
        return cls(noise, text_condition(rows, spec.prompts, spec.pixels).to(device), keys)

    def __len__(self) -> int:
        return len(self.noise_NCHW)
