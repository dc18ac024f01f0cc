"""Classify images of the built-in models, to evaluate them.

The labels tell whether a sample shows the requested class. The penultimate features replace those of
Inception in FID (Heusel et al. 2017), which mean little for images of 28 or 32 pixels.
`pipelines.pretrain.train_classifier` trained them: one for Fashion-MNIST, one for emoji.
Shapes: N batch, C channels, H W image, F features, K classes.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from harmonica.builtin import CLASSIFIER
from harmonica.io.tensor_files import write_tensors

WEIGHTS_FILE, STATISTICS_FILE, CONFIG_FILE = (
    "classifier.safetensors",
    "feature_statistics.safetensors",
    "config.json",
)
FEATURE_SIZE = 96


def _convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class Classifier(nn.Module):
    """Applies four convolutions and a linear layer to images (N, C, H, W) in [-1, 1]."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            _convolution(in_channels, 32, 5, stride=2),
            _convolution(32, 64, 3),
            nn.MaxPool2d(2),
            _convolution(64, 128, 3),
            _convolution(128, FEATURE_SIZE, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(FEATURE_SIZE, num_classes)

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Return the penultimate activations (N, F)."""
        features_NF: Tensor = self.backbone(images_NCHW)
        return features_NF

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return logits (N, K)."""
        logits_NK: Tensor = self.head(self.features(images_NCHW))
        return logits_NK


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write the weights in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.to(torch.float16 if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in classifier.state_dict().items()
    }
    write_tensors(state, folder / WEIGHTS_FILE)


def load_classifier(folder: Path = CLASSIFIER) -> Classifier:
    """Load the classifier of a folder: float32, in eval mode, frozen.

    Args:
        folder: by default that of Fashion-MNIST; `harmonica.builtin` has both.

    Raises:
        FileNotFoundError: the folder holds no classifier.
    """
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS_FILE}: give a folder made by pipelines.pretrain.train_classifier"
        )
    state = load_file(path)
    classifier = Classifier(state["backbone.0.0.weight"].shape[1], len(state["head.weight"]))
    classifier.load_state_dict(state)  # copies into float32 parameters
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def features_and_logits(
    classifier: Classifier, images_NCHW: Tensor, batch_size: int = 500
) -> tuple[Tensor, Tensor]:
    """Return features (N, F) and logits (N, K) of images, computed in batches."""
    features = torch.cat([classifier.features(batch) for batch in images_NCHW.split(batch_size)])
    return features, classifier.head(features)
