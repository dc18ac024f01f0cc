"""Settings of a pre-training, and what the loop asks of a task."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from harmonica.evaluation import fashion_mnist
from harmonica.validation.settings import Count, Field, Natural, Positive, settings

from .learning import LearningConfig


@settings()
class PretrainConfig(LearningConfig):
    """Settings with which a built-in denoiser is trained."""

    run_id: str = "fashion-dit"
    """Names the run; the same id resumes it."""
    storage_path: str = "runs/pretrain"
    """Folder that holds runs."""
    data_folder: str = str(fashion_mnist.DEFAULT_FOLDER)
    """Folder with the files of the images: the four of Fashion-MNIST, or the two archives of the emoji."""
    num_workers: Count = 2
    """Data-parallel workers, one core each."""
    use_gpu: bool = False
    """One GPU a worker."""
    batch_size: Count = 128
    """Global batch."""
    steps: Count = 4200
    """Optimiser steps in all."""
    decay_steps: Count = 1600
    """The last of them, over which the learning rate falls to zero."""
    warmup_steps: Count = 100
    """The first of them, over which it rises."""
    learning_rate: Positive = 2e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Of the blocks' matrices."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged weights, which are the ones kept."""
    condition_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of conditions replaced by the empty one, for guidance."""
    seed: Natural = 0
    """Fixes initial weights, batches, noise and timesteps."""
    compile: bool = True
    """torch.compile the denoiser."""
    bfloat16: bool = False
    """Multiply in bfloat16 (`torch.autocast`); weights and their averages stay in float32."""
    checkpoint_interval_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds between checkpoints."""
    export: str = ""
    """Write the last checkpoint's EMA weights to this folder instead of training."""


Config = TypeVar("Config", bound=PretrainConfig)


class Task(ABC, Generic[Config]):
    """A task for a denoiser on the images, with labels or with captions.

    The loop around it is the same for both.
    """

    def __init__(self, config: Config, images: np.ndarray, labels: np.ndarray) -> None:
        self.config, self.images, self.labels = config, images, labels

    @staticmethod
    def load(folder: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return images (rows, C, H, W) uint8 and labels (rows,) int64 to train on.

        Raises:
            FileNotFoundError: the folder does not hold them.
        """
        return fashion_mnist.load_fashion_mnist("train", folder)

    @abstractmethod
    def make_model(self) -> nn.Module:
        """Return the model with its initial weights."""

    @abstractmethod
    def loss(
        self,
        forward: Callable[..., Tensor],
        clean_NCHW: Tensor,
        rows: np.ndarray,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the loss of `forward` on the clean images of these rows.

        `forward` is the replicated model.
        """

    def batch(self, step: int, rank: int, world_size: int) -> tuple[np.ndarray, torch.Generator]:
        """Return a rank's rows of global batch `step`, and a generator for its noise.

        Both are a pure function of (seed, step, rank).
        """
        share = self.config.batch_size // world_size
        rng = np.random.Generator(np.random.Philox(key=self.config.seed, counter=[0, 0, 0, step]))
        rows = self.draw_rows(rng)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)) + rank)
        return rows[rank * share :][:share], generator

    def draw_rows(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the rows (batch,) of a global batch: each image is as likely."""
        return rng.integers(len(self.images), size=self.config.batch_size)
