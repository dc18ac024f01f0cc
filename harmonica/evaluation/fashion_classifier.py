"""A small Fashion-MNIST classifier: the judge of the built-in model's images.

Its labels say whether a sample shows what was asked for; its penultimate features stand where
Inception's stand in FID (Heusel et al. 2017), whose network means little on 28 x 28 grey pictures.

    python -m harmonica.evaluation.fashion_classifier --out harmonica/builtin/classifier

trains it on the 60,000 training images and writes the weights, the statistics of the 10,000 test
images' features, the features of some of them and a `config.json`.
Shapes: N batch, C channels, H W image, F features, K classes.
"""

import json
import logging
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from harmonica.evaluation import fashion_mnist
from harmonica.io.paths import local
from harmonica.io.tensor_files import write_tensors

logger = logging.getLogger(__name__)

BUILTIN_FOLDER = Path(__file__).parents[1] / "builtin" / "classifier"
WEIGHTS_FILE, STATISTICS_FILE, CONFIG_FILE = (
    "classifier.safetensors",
    "feature_statistics.safetensors",
    "config.json",
)
NUM_CLASSES = len(fashion_mnist.CLASS_NAMES)
FEATURE_SIZE = 96
_MAX_SHIFT = 1


def _convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class Classifier(nn.Module):
    """Four convolutions and a linear layer for (N, 1, 28, 28) images in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            _convolution(1, 32, 5, stride=2),
            _convolution(32, 64, 3),
            nn.MaxPool2d(2),
            _convolution(64, 128, 3),
            _convolution(128, FEATURE_SIZE, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(FEATURE_SIZE, NUM_CLASSES)

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Penultimate activations (N, F)."""
        return self.backbone(images_NCHW)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self.head(self.features(images_NCHW))


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write the weights in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.to(torch.float16 if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in classifier.state_dict().items()
    }
    write_tensors(state, folder / WEIGHTS_FILE)


def load_classifier(folder: Path = BUILTIN_FOLDER) -> Classifier:
    """The classifier of a folder: float32, in eval mode, frozen.

    Raises:
        FileNotFoundError: the folder holds no classifier.
    """
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS_FILE}: give a folder made by harmonica.evaluation.fashion_classifier"
        )
    classifier = Classifier()
    classifier.load_state_dict(load_file(path))  # copies into float32 parameters
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def features_and_logits(
    classifier: Classifier, images_NCHW: Tensor, batch_size: int = 500
) -> tuple[Tensor, Tensor]:
    """Features (N, F) and logits (N, K) of any number of images, from one pass in batches."""
    features = torch.cat([classifier.features(batch) for batch in images_NCHW.split(batch_size)])
    return features, classifier.head(features)


@dataclass(frozen=True, slots=True, eq=False)
class FeatureStatistics:
    """The Gaussian that stands for a set of images in a Frechet distance."""

    mean: Tensor
    """(F,) float64."""
    covariance: Tensor
    """(F, F) float64, unbiased."""
    count: int
    """Images behind it."""

    @classmethod
    def from_features(cls, features_NF: Tensor) -> Self:
        """Statistics of a set of features.

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
        tensors = {"mean": self.mean, "covariance": self.covariance, "count": torch.tensor(self.count)}
        write_tensors({name: tensor.cpu() for name, tensor in tensors.items()}, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        tensors = load_file(path)
        return cls(tensors["mean"], tensors["covariance"], int(tensors["count"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierTraining:
    """How the classifier is trained."""

    data_folder: Path = fashion_mnist.DEFAULT_FOLDER
    """Folder with the four IDX files of Fashion-MNIST."""
    out: Path = BUILTIN_FOLDER
    """Folder to write."""
    epochs: int = 8
    """Passes over the 60,000 images."""
    batch_size: int = 250
    """Images a step."""
    learning_rate: float = 5e-3
    """Peak of the one-cycle schedule."""
    weight_decay: float = 0.02
    """AdamW's."""
    label_smoothing: float = 0.05
    """Share of the target spread over all classes."""
    seed: int = 0
    """Fixes initial weights, order and shifts; the last digits also depend on the thread count."""


def _to_input(images_NCHW: Tensor) -> Tensor:
    """uint8 pixels to [-1, 1], laid out as the CPU's convolutions like it."""
    return (images_NCHW.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _shifted(images_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to a pixel each way, black moving in."""
    n = len(images_NCHW)
    height, width = images_NCHW.shape[2:]
    windows = F.pad(images_NCHW, (_MAX_SHIFT,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    y_N, x_N = torch.randint(2 * _MAX_SHIFT + 1, (2, n), generator=generator)
    return windows[torch.arange(n), :, y_N, x_N]


def train(config: ClassifierTraining) -> Classifier:
    """The trained network, in eval mode."""
    images, labels = map(torch.tensor, fashion_mnist.load_fashion_mnist("train", config.data_folder))
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        classifier = Classifier()
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        config.learning_rate,
        epochs=config.epochs,
        steps_per_epoch=-(-len(images) // config.batch_size),
    )
    for epoch in range(config.epochs):
        loss_sum = 0.0
        for rows in torch.randperm(len(images), generator=generator).split(config.batch_size):
            logits = classifier(_to_input(_shifted(images[rows], generator)))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=config.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(rows)
        logger.info("epoch %d of %d, loss %.4f", epoch + 1, config.epochs, loss_sum / len(images))
    return classifier.eval()


def main() -> None:
    from harmonica.evaluation.reference_sets import write_builtin_reference  # which is made of this module

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(ClassifierTraining, description=__doc__)
    config = replace(
        config, out=local(config.out, "out"), data_folder=local(config.data_folder, "data_folder")
    )
    save_classifier(train(config), config.out)
    # Judged as it will be used: after the rounding to half precision.
    classifier = load_classifier(config.out)
    images, labels = map(torch.tensor, fashion_mnist.load_fashion_mnist("test", config.data_folder))
    features, logits = features_and_logits(classifier, _to_input(images))
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    FeatureStatistics.from_features(features).save(config.out / STATISTICS_FILE)
    write_builtin_reference(config.out, config.data_folder)
    settings = ("epochs", "batch_size", "learning_rate", "weight_decay", "label_smoothing", "seed")
    command = ["python", "-m", "harmonica.evaluation.fashion_classifier"]
    for name in settings:
        command += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    about = {
        "test_accuracy": round(accuracy, 4),
        "feature_size": FEATURE_SIZE,
        "trained_with": shlex.join(command),
        "data_set": "Fashion-MNIST (Zalando Research)",
        "data_set_licence": "MIT",
        "feature_statistics_of": f"the {len(images)} test images",
    }
    (config.out / CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n")
    logger.info("test accuracy %.4f, wrote %s", accuracy, config.out)


if __name__ == "__main__":
    main()
