"""Make the rows that a run samples: labels and noise, or a pipeline's prompts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch

from harmonica.data.embedding_store import EmbeddingStore
from harmonica.samplers.noise import SampleKeys

if TYPE_CHECKING:
    from harmonica.pipeline_training.backend import PipelineBatch


class Rows(Protocol):
    """Rows by number, as Ray Data streams them and as a model takes them.

    `harmonica.data.samples.SampleSpec` is one, for models with a branch file.
    """

    @property
    def sample_bytes(self) -> int:
        """Bytes of a row in a stream."""
        ...

    def make(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the columns of rows, `index` and `label` among them."""
        ...

    def to_batch(self, columns: Mapping[str, Any], device: torch.device | str) -> Any:
        """Return what a model samples; it has a length."""
        ...

    def texts(self, labels: np.ndarray) -> list[str] | None:
        """Return the prompts of labels; None where labels are classes."""
        ...

    def with_other_noise(self, offset: int) -> Self:
        """Return rows of the same kind at a seed that is so much higher."""
        ...


@dataclass(frozen=True, slots=True)
class PipelineRows:
    """Rows of a diffusers pipeline, of which row i has prompt i of the store.

    After the last prompt comes the first again.
    """

    seed: int
    prompts: EmbeddingStore

    @property
    def sample_bytes(self) -> int:
        return 16  # two numbers: the worker that samples reads the prompts itself

    def make(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"index": indices, "label": indices % len(self.prompts)}

    def to_batch(self, columns: Mapping[str, Any], device: torch.device | str) -> "PipelineBatch":
        # Not at the top: workers that only make rows need no training.
        from harmonica.pipeline_training.backend import PipelineBatch

        prompts = [self.prompts[int(label)] for label in columns["label"]]
        return PipelineBatch(prompts, SampleKeys.of(self.seed, [int(row) for row in columns["index"]]))

    def texts(self, labels: np.ndarray) -> list[str]:
        return [self.prompts.text(int(label)) for label in labels]

    def with_other_noise(self, offset: int) -> "PipelineRows":
        return PipelineRows(self.seed + offset, self.prompts)
