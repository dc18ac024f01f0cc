"""Compute confidence intervals by the bootstrap.

Images are drawn with replacement, the same ones at every call.

Shapes: N images, R resamples.
"""

import numpy as np
import torch
from torch import Tensor

COVERAGE = 0.95


def resample_weights(count: int, resamples: int, seed: int = 0) -> Tensor:
    """Return each image's count in each resample, (R, N) float64; rows sum to N.

    They follow from the arguments alone, so two variants that are resampled by them keep their pairs.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    return torch.from_numpy(generator.multinomial(count, np.full(count, 1 / count), resamples)).double()


def interval(
    value: float,
    resampled_R: Tensor,
    *,
    count: int = 1,
    resampled_count: int = 1,
    low: float = -np.inf,
    high: float = np.inf,
) -> list[float]:
    """Return the 95% interval [low, high] of a number, from its values on resamples.

    The resampled values are centred upon the number, because an image that is drawn twice makes a Frechet
    distance larger, which says nothing of its spread. The interval says how far the number moves with
    other images, as many.

    Args:
        count: images behind `value`.
        resampled_count: images behind the resamples, where fewer: the spread falls with the root.
        low: least value that the number can have.
        high: largest.
    """
    tail = (1 - COVERAGE) / 2
    deviations = (resampled_R - resampled_R.mean()) * (resampled_count / count) ** 0.5
    ends = torch.quantile(deviations, torch.tensor([tail, 1 - tail], dtype=deviations.dtype))
    return [min(max(value + end, low), high) for end in ends.tolist()]


def weighted_means(values_N: Tensor, weights_RN: Tensor) -> Tensor:
    """Return the mean (R,) of each resample."""
    return weights_RN @ values_N.double() / weights_RN.sum(1)
