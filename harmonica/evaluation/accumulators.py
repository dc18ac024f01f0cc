"""Accumulate metrics of a variant's images in one pass.

It keeps values of each image, sums over all of them, and features of some.

Values are stored by row index, so the order of arrival and the batch size change nothing but the rounding of
float64 sums.
Shapes: N rows of a batch, F features, K classes.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from harmonica.evaluation.distribution_metrics import class_information, inception_score
from harmonica.evaluation.feature_statistics import FeatureStatistics

KEPT_ROWS = 10_000
"""Number of images whose features are kept: 160 MB for Inception's two kinds."""
POOLED, SPATIAL, LOGITS = "pooled", "spatial", "logits"
_SPLIT = 5_000  # images behind one Inception Score, as in ADM's evaluator


class FeatureSums:
    """Sums features and their products, for the mean and covariance of many images."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.sum_F = torch.zeros(size, dtype=torch.float64)
        self.products_FF = torch.zeros(size, size, dtype=torch.float64)

    def add(self, features_NF: Tensor) -> None:
        """Add the features of a batch (N, F)."""
        features = features_NF.double()
        self.count += len(features)
        self.sum_F += features.sum(0)
        self.products_FF.addmm_(features.T, features)

    def statistics(self) -> FeatureStatistics:
        """Return the mean and covariance of all rows so far.

        Raises:
            ValueError: fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} images have no covariance: give 2 or more")
        mean = self.sum_F / self.count
        covariance = (self.products_FF - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return FeatureStatistics(mean, covariance, self.count)


class _ScoreSums:
    """Holds the sums behind the Inception Score, a set for every 5,000 images."""

    def __init__(self, num_rows: int, num_classes: int) -> None:
        splits = -(-num_rows // _SPLIT)
        self.count = torch.zeros(splits, dtype=torch.float64)
        self.p = torch.zeros(splits, num_classes, dtype=torch.float64)
        self.p_log_p = torch.zeros(splits, dtype=torch.float64)

    def add(self, index_N: Tensor, logits_NK: Tensor) -> None:
        split = index_N // _SPLIT
        p, p_log_p = class_information(logits_NK)
        self.count.index_add_(0, split, torch.ones_like(p_log_p))
        self.p.index_add_(0, split, p)
        self.p_log_p.index_add_(0, split, p_log_p)

    def score(self) -> float:
        return inception_score(self.p / self.count[:, None], self.p_log_p / self.count).mean().item()


class MetricAccumulator:
    """Accumulates the metrics of one variant's `num_rows` images.

    Memory: 8 bytes for each value of an image; for features 4 F bytes for each kept image, and 8 F^2.
    """

    def __init__(self, num_rows: int, kept_rows: int = KEPT_ROWS) -> None:
        self.num_rows, self.num_kept = num_rows, min(num_rows, kept_rows)
        self.numbers: dict[str, Tensor] = {}
        """Values of every image by name: PSNR, class, ..."""
        self.kept: dict[str, Tensor] = {}
        """Features of the first `num_kept` images."""
        self.sums: dict[str, FeatureSums] = {}
        self._scores: _ScoreSums | None = None

    def add(self, index_N: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        """Add a batch: values (N,), and features and logits (N, ...) if there are any."""
        index = torch.from_numpy(index_N.astype(np.int64))
        for name, column in columns.items():
            values = torch.tensor(column)
            if values.ndim == 1:
                self._place(self.numbers, name, self.num_rows, index, values.double())
                continue
            among = index < self.num_kept
            self._place(self.kept, name, self.num_kept, index[among], values[among].float())
            if name == LOGITS:
                self._scores = self._scores or _ScoreSums(self.num_rows, values.shape[1])
                self._scores.add(index, values)
            else:
                self.sums.setdefault(name, FeatureSums(values.shape[1])).add(values)

    def _place(self, table: dict[str, Tensor], name: str, rows: int, index: Tensor, values: Tensor) -> None:
        if name not in table:  # a row that never comes stays NaN, and is seen
            table[name] = torch.full((rows, *values.shape[1:]), torch.nan, dtype=values.dtype)
        table[name][index] = values

    def inception_score(self) -> float:
        """Return the mean of the scores of each 5,000 images."""
        assert self._scores is not None
        return self._scores.score()
