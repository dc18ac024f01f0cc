"""Train the built-in classifier and write its reference statistics.

    python -m harmonica.pretraining.train_classifier --out harmonica/builtin/classifier

trains it on the 60,000 training images and writes the weights, the statistics of the 10,000 test
images' features, the features of some of them and a `config.json`. Shapes: N batch, C channels, H W image.
"""

import json
import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from harmonica.evaluation import fashion_mnist
from harmonica.evaluation.classifier import (
    BUILTIN_FOLDER,
    CONFIG_FILE,
    FEATURE_SIZE,
    STATISTICS_FILE,
    Classifier,
    features_and_logits,
    load_classifier,
    save_classifier,
)
from harmonica.evaluation.feature_extractors import ClassifierFeatures
from harmonica.evaluation.feature_statistics import FeatureStatistics
from harmonica.evaluation.reference_sets import FEATURES_FILE, SPATIAL_FILE
from harmonica.io.paths import local
from harmonica.io.tensor_files import write_tensors
from harmonica.validation.settings import Count, Field, Natural, Positive, settings

logger = logging.getLogger(__name__)

_MAX_SHIFT = 1
_SHIPPED_IMAGES = 2_000
_BATCH = 50


@settings()
class ClassifierTraining:
    """Settings of the classifier's training."""

    data_folder: Path = fashion_mnist.DEFAULT_FOLDER
    """Folder with the four IDX files of Fashion-MNIST."""
    out: Path = BUILTIN_FOLDER
    """Folder to write."""
    epochs: Count = 8
    """Passes over the 60,000 images."""
    batch_size: Count = 250
    """Images in each step."""
    learning_rate: Positive = 5e-3
    """Peak of the one-cycle schedule."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.02
    """Weight decay of AdamW."""
    label_smoothing: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Fraction of the target spread over all classes."""
    seed: Natural = 0
    """Fixes initial weights, order and shifts; the last digits also depend on the thread count."""


def _to_input(images_NCHW: Tensor) -> Tensor:
    """Convert uint8 pixels to [-1, 1], in the memory layout that is fast on CPUs."""
    return (images_NCHW.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _shifted(images_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to one pixel in each direction, padding with black."""
    n = len(images_NCHW)
    height, width = images_NCHW.shape[2:]
    windows = F.pad(images_NCHW, (_MAX_SHIFT,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    y_N, x_N = torch.randint(2 * _MAX_SHIFT + 1, (2, n), generator=generator)
    return windows[torch.arange(n), :, y_N, x_N]


def train_classifier(config: ClassifierTraining) -> Classifier:
    """Train the classifier and return it in eval mode."""
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


def write_builtin_reference(folder: Path, data_folder: Path = fashion_mnist.DEFAULT_FOLDER) -> None:
    """Write the reference files that are computed with the classifier in `folder`.

    They are the files of `builtin_reference` other than the pooled statistics.
    """
    images = torch.tensor(fashion_mnist.load_fashion_mnist("test", data_folder)[0]).float() / 127.5 - 1
    seen = [ClassifierFeatures(folder)(batch) for batch in images.split(_BATCH)]
    pooled = torch.cat([features.pooled_NF for features in seen])
    spatial = torch.cat([features.spatial_NS for features in seen])
    FeatureStatistics.from_features(spatial).save(folder / SPATIAL_FILE)
    write_tensors({"features": pooled[:_SHIPPED_IMAGES].half()}, folder / FEATURES_FILE)


def main() -> None:
    """Train the classifier and save it, by the command line's settings."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(ClassifierTraining, description=__doc__)
    config = replace(
        config, out=local(config.out, "out"), data_folder=local(config.data_folder, "data_folder")
    )
    save_classifier(train_classifier(config), config.out)
    # Evaluated as it will be used: after the rounding to half precision.
    classifier = load_classifier(config.out)
    images, labels = map(torch.tensor, fashion_mnist.load_fashion_mnist("test", config.data_folder))
    features, logits = features_and_logits(classifier, _to_input(images))
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    FeatureStatistics.from_features(features).save(config.out / STATISTICS_FILE)
    write_builtin_reference(config.out, config.data_folder)
    names = ("epochs", "batch_size", "learning_rate", "weight_decay", "label_smoothing", "seed")
    command = ["python", "-m", "harmonica.pretraining.train_classifier"]
    for name in names:
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
