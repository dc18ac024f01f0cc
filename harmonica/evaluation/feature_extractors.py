"""Extract the features between which distances of image sets are computed.

Shapes: N batch, C channels, H W image, F pooled features, S spatial ones, K classes.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from harmonica.builtin import CLASSIFIER
from harmonica.evaluation.classifier import load_classifier
from harmonica.io.safe_load import read_tensors
from harmonica.torchvision_ops import ensure_torchvision_imports
from harmonica.validation.extras import need

_INCEPTION_CHANNELS = 7  # of ADM's evaluator
_CLASSIFIER_CHANNELS = 2  # x 7 x 7 or 8 x 8: about as many values as it has pooled features, as in Inception


@dataclass(frozen=True, slots=True)
class Features:
    """Holds the features of a batch of images, float32 on the CPU."""

    pooled_NF: Tensor
    """Output of the last layer before the classes, for Frechet distance, KID, precision and recall."""
    spatial_NS: Tensor
    """Output of a middle layer, which still has spatial positions, for sFID (Nash et al. 2021)."""
    logits_NK: Tensor


class FeatureExtractor(Protocol):
    """Maps images (N, C, H, W) in [-1, 1] to features by a network."""

    def __call__(self, images_NCHW: Tensor) -> Features: ...


def _spatial(activations_NCHW: Tensor, channels: int) -> Tensor:
    """Return the first channels, flattened in the order H, W, C of ADM's statistics."""
    return activations_NCHW[:, :channels].permute(0, 2, 3, 1).flatten(1).float().cpu()


class ClassifierFeatures:
    """Applies a shipped classifier to images.

    That of Fashion-MNIST takes (N, 1, 28, 28) and gives 96 pooled and 98 spatial features, that of emoji
    takes (N, 3, 32, 32) and gives 96 and 128.
    """

    def __init__(self, folder: Path = CLASSIFIER) -> None:
        self.classifier = load_classifier(folder)
        self.middle, self.rest = self.classifier.backbone[:4], self.classifier.backbone[4:]

    @torch.no_grad()
    def __call__(self, images_NCHW: Tensor) -> Features:
        activations = self.middle(images_NCHW.float().cpu())
        pooled = self.rest(activations)
        return Features(pooled, _spatial(activations, _CLASSIFIER_CHANNELS), self.classifier.head(pooled))


class InceptionFeatures:
    """Applies FID's Inception-v3 of 2015, by torch-fidelity.

    It gives 2,048 pooled and 2,023 spatial features.

    The spatial ones are the first 7 channels of `mixed_6/conv`, as in ADM's evaluator; the logits are
    without their bias, as the Inception Score takes them.
    """

    def __init__(self, weights: str | Path, device: torch.device | str = "cpu") -> None:
        """Load the network.

        Args:
            weights: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, or the same tensors as
                safetensors.

        Raises:
            ValueError: the file cannot be read, would have to be executed, or holds another network.
        """
        ensure_torchvision_imports()
        need("torch_fidelity", extra="evaluate")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity would unpickle the file: it is given a copy that we have made of its tensors.
        safe = io.BytesIO()
        torch.save(dict(read_tensors(weights)), safe)
        safe.seek(0)
        try:
            network: Any = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], safe)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(
                f"evaluate.inception_path {weights} holds another network: give torch-fidelity's weights of "
                f"Inception-v3 ({str(error).splitlines()[0]})"
            ) from error
        self.device = torch.device(device)
        self.network = network.to(self.device)

    @torch.no_grad()
    def __call__(self, images_NCHW: Tensor) -> Features:
        pixels = ((images_NCHW.to(self.device).float() + 1) * 127.5).round().clamp(0, 255).byte()
        return self.of_pixels(pixels)

    @torch.no_grad()
    def of_pixels(self, pixels_NCHW: Tensor) -> Features:
        """Return features of uint8 pixels, grey or RGB.

        Images are scaled to 299 x 299 as TensorFlow 1 did.
        """
        pixels = pixels_NCHW.to(self.device).expand(-1, 3, -1, -1)
        middle: list[Tensor] = []
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: middle.append(call[2]))
        try:
            pooled, logits = self.network(pixels)
        finally:
            hook.remove()
        return Features(pooled.cpu(), _spatial(middle[0], _INCEPTION_CHANNELS), logits.cpu())
