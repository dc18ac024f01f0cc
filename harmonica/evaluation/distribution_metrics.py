"""Compute distances between sets of images in feature space, also on resamples.

A resample is a row of weights: how often each image is in it (`harmonica.evaluation.bootstrap`). All is
float64. Shapes: N M images of two sets, F features, K classes, R resamples.
"""

import torch
from torch import Tensor

from harmonica.evaluation.feature_statistics import FeatureStatistics
from harmonica.torchvision_ops import ensure_torchvision_imports
from harmonica.validation.extras import need

need("torchmetrics", extra="evaluate")

_ROWS = 1000  # computed at once of a kernel or of distances


def _weighted_moments(features_NF: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
    total = weight_N.sum()
    mean = weight_N @ features_NF / total
    centred = features_NF - mean
    return mean, (centred * weight_N[:, None]).T @ centred / (total - 1)


def _root(covariance_FF: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance_FF)
    root_FF: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root_FF


def frechet_resampled(features_NF: Tensor, other: Tensor | FeatureStatistics, weights_RN: Tensor) -> Tensor:
    """Return Frechet distances (R,) of resamples to another set, or to statistics.

    The other set is resampled by the same weights.

    It equals `image_metrics.frechet_distance`, by symmetric roots: tr sqrt(AB) = tr sqrt(sqrt(B) A sqrt(B)).
    """
    x = features_NF.double()
    fixed = _root(other.covariance) if isinstance(other, FeatureStatistics) else None
    distances = torch.empty(len(weights_RN), dtype=torch.float64)
    for row, weight in enumerate(weights_RN):
        mean, covariance = _weighted_moments(x, weight)
        if isinstance(other, FeatureStatistics):
            assert fixed is not None
            other_mean, other_covariance, root = other.mean, other.covariance, fixed
        else:
            other_mean, other_covariance = _weighted_moments(other.double(), weight)
            root = _root(other_covariance)
        traces = covariance.trace() + other_covariance.trace()
        overlap = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
        distances[row] = (mean - other_mean).square().sum() + traces - 2 * overlap
    return distances


def _kernel_means(
    x_NF: Tensor, y_MF: Tensor, x_weights_RN: Tensor, y_weights_RM: Tensor, *, skip_same: bool
) -> Tensor:
    """Return the mean (R,) of the cubic kernel over pairs of rows.

    `skip_same` omits pairs of a row with itself.
    """
    ensure_torchvision_imports()  # first: importing torchmetrics imports torchvision
    from torchmetrics.image.kid import poly_kernel  # not at the top, since it takes seconds

    sums = torch.zeros(len(x_weights_RN), dtype=torch.float64)
    for start in range(0, len(x_NF), _ROWS):
        rows = slice(start, start + _ROWS)
        kernel = poly_kernel(x_NF[rows], y_MF)
        if skip_same:
            kernel.diagonal(start).zero_()
        sums += (x_weights_RN[:, rows].T * (kernel @ y_weights_RM.T)).sum(0)
    pairs = x_weights_RN.sum(1) * y_weights_RM.sum(1)
    if skip_same:
        pairs = pairs - (x_weights_RN * y_weights_RM).sum(1)
    return sums / pairs


def kernel_distances(x_NF: Tensor, y_MF: Tensor, weights_RN: Tensor, *, same_rows: bool) -> Tensor:
    """Return KID (R,), the unbiased squared MMD (Binkowski et al. 2018).

    The kernel is cubic. All images are compared at once, not subsets whose distances are averaged: the
    expectation is the same, with less noise. It is slightly below 0 where the sets are alike.

    Args:
        same_rows: row i of both sets was made from the same noise, so the two are resampled together and
            their own pair is left out of the mixed term (Gretton et al. 2012, eq. 4); else y is fixed.
    """
    x, y = x_NF.double(), y_MF.double()
    y_weights = weights_RN if same_rows else torch.ones(1, len(y), dtype=torch.float64)
    within_x = _kernel_means(x, x, weights_RN, weights_RN, skip_same=True)
    within_y = _kernel_means(y, y, y_weights, y_weights, skip_same=True)
    mixed = _kernel_means(x, y, weights_RN, y_weights.expand(len(weights_RN), -1), skip_same=same_rows)
    return within_x + within_y - 2 * mixed


def _radii(features_NF: Tensor, neighbours: int) -> Tensor:
    """Return the distance (N,) of each point to its k-th nearest neighbour."""
    blocks = features_NF.split(_ROWS)
    # The nearest of all is the image itself.
    return torch.cat([torch.cdist(b, features_NF).kthvalue(neighbours + 1).values for b in blocks])


def in_manifold(points_NF: Tensor, of_MF: Tensor, neighbours: int = 3) -> Tensor:
    """Return whether each point (N,) is in the manifold of the other set.

    It is if it is within the radius of a point of that set, the distance to that point's k-th neighbour.

    Kynkaanniemi et al. 2019, eq. 1 and 2: the mean is precision for generated points among real ones, recall
    for real points among generated ones.

    Raises:
        ValueError: fewer images than neighbours.
    """
    if len(of_MF) <= neighbours:
        raise ValueError(f"{len(of_MF)} images have no {neighbours} neighbours: give more")
    points, centres = points_NF.double(), of_MF.double()
    radii = _radii(centres, neighbours)
    blocks = points.split(_ROWS)
    return torch.cat([(torch.cdist(b, centres) <= radii).any(1) for b in blocks])


def class_information(logits_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return p(class) (N, K) and the sum of p log p (N,) of each image."""
    log_p = logits_NK.double().log_softmax(1)
    p = log_p.exp()
    return p, (p * log_p).sum(1)


def inception_score(mean_p_RK: Tensor, mean_p_log_p_R: Tensor) -> Tensor:
    """Return the Inception Score (R,) (Salimans et al. 2016).

    It is exp of the mean KL divergence of p(class | image) from p(class).
    """
    entropy = torch.special.entr(mean_p_RK).sum(-1)
    score_R: Tensor = (mean_p_log_p_R + entropy).exp()
    return score_R
