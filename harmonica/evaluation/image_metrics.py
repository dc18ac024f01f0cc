"""Compute metrics of images: PSNR, SSIM, label agreement and label accuracy.

They tell how close cached samples are to uncached ones, and how good they are.

Shapes: N batch, C channels, H W image, K classes.
"""

from types import ModuleType

import torch
from torch import Tensor

from harmonica.evaluation.feature_statistics import FeatureStatistics
from harmonica.torchvision_ops import ensure_torchvision_imports
from harmonica.validation.extras import need

need("torchmetrics", extra="evaluate")

DATA_RANGE = 2.0  # images live in [-1, 1]


def _torchmetrics() -> ModuleType:
    """Return torchmetrics' functions of images."""
    ensure_torchvision_imports()  # first: importing torchmetrics imports torchvision
    from torchmetrics.functional import image  # not at the top, since it takes seconds

    return image


def psnr(images_NCHW: Tensor, reference_NCHW: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio (N,) in dB; infinite for equal images."""
    _check_same_shape(images_NCHW, reference_NCHW)
    value: Tensor = _torchmetrics().peak_signal_noise_ratio(
        images_NCHW.float(), reference_NCHW.float(), data_range=DATA_RANGE, reduction="none", dim=(1, 2, 3)
    )
    return value


def ssim(images_NCHW: Tensor, reference_NCHW: Tensor) -> Tensor:
    """Return the structural similarity (N,), at most 1 (Wang et al. 2004).

    The window is a Gaussian of sigma 1.5.
    """
    _check_same_shape(images_NCHW, reference_NCHW)
    value: Tensor = _torchmetrics().structural_similarity_index_measure(
        images_NCHW.float(), reference_NCHW.float(), data_range=DATA_RANGE, reduction="none"
    )
    return value


def _check_same_shape(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape:
        raise ValueError(f"images have shape {tuple(images.shape)}, their reference {tuple(reference.shape)}")


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return two Gaussians' squared Frechet distance (Heusel et al. 2017, eq. 6).

    It is biased upwards for few images: compare numbers of equal `count` only.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"feature sizes differ: {len(a.mean)} and {len(b.mean)}")
    _torchmetrics()
    # Private, but the only form that takes statistics: the public metric wants the reference images.
    from torchmetrics.image.fid import _compute_fid

    statistics = (s.to("cpu", torch.float64) for s in (a.mean, a.covariance, b.mean, b.covariance))
    return max(0.0, _compute_fid(*statistics).item())  # rounding may leave -1e-12


def label_accuracy(logits_NK: Tensor, label_N: Tensor) -> float:
    """Return the share of images that the classifier gives the requested label."""
    return (logits_NK.argmax(dim=1) == label_N).double().mean().item()


def label_agreement(logits_NK: Tensor, reference_logits_NK: Tensor) -> float:
    """Return the share of images whose label is that of their uncached counterpart."""
    return label_accuracy(logits_NK, reference_logits_NK.argmax(dim=1))
