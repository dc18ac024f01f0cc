"""Compute the mean and covariance of features, as a Frechet distance needs them.

Shapes: N images, F features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from harmonica.io.tensor_files import write_tensors


@dataclass(frozen=True, slots=True, eq=False)
class FeatureStatistics:
    """Describes a set of images by a Gaussian of their features."""

    mean: Tensor
    """(F,) float64."""
    covariance: Tensor
    """(F, F) float64, unbiased."""
    count: int
    """Images behind it."""

    @classmethod
    def from_features(cls, features_NF: Tensor) -> Self:
        """Return the statistics of a set of features.

        Raises:
            ValueError: not a table of at least two rows.
        """
        if features_NF.ndim != 2 or len(features_NF) < 2:
            raise ValueError(
                f"features have shape {tuple(features_NF.shape)}: give (N, F) with N of 2 or more"
            )
        features = features_NF.double()
        return cls(features.mean(dim=0), torch.cov(features.T), len(features))

    def save(self, path: Path) -> None:
        """Write the statistics as safetensors."""
        tensors = {"mean": self.mean, "covariance": self.covariance, "count": torch.tensor(self.count)}
        write_tensors({name: tensor.cpu() for name, tensor in tensors.items()}, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read statistics that `save` wrote."""
        tensors = load_file(path)
        return cls(tensors["mean"], tensors["covariance"], int(tensors["count"]))
