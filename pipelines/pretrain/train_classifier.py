"""Train a built-in classifier and write its reference statistics.

    python -m pipelines.pretrain.train_classifier --out harmonica/builtin/classifier
    python -m pipelines.pretrain.train_classifier --data emoji --data-folder FOLDER --epochs 40 --out OUT

trains it on the training images and writes the weights, the statistics of real images' features, the
features of some of them and a `config.json`. Of emoji, which come in no two parts, every tenth picture is
kept for testing; the statistics are of all, each class as likely.
Shapes: N batch, C channels, H W image, M real images.
"""

import json
import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from harmonica.builtin import CLASSIFIER
from harmonica.evaluation import fashion_mnist
from harmonica.evaluation.classifier import (
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
from harmonica.evaluation.image_metrics import label_accuracy
from harmonica.evaluation.reference_sets import FEATURES_FILE, SPATIAL_FILE
from harmonica.io.paths import local
from harmonica.io.tensor_files import write_tensors
from harmonica.validation.settings import Count, Field, Natural, Positive, settings

from . import emoji_data

logger = logging.getLogger(__name__)

_MAX_SHIFT = 1
_SHIPPED_IMAGES = 2_000
_TEST_EVERY = 10
_BATCH = 50


@settings()
class ClassifierTraining:
    """Settings of the classifier's training."""

    data: Literal["fashion", "emoji"] = "fashion"
    """What it learns to tell apart."""
    data_folder: Path = fashion_mnist.DEFAULT_FOLDER
    """Folder with the four IDX files of Fashion-MNIST, or with the two archives of the emoji."""
    out: Path = CLASSIFIER
    """Folder to write."""
    epochs: Count = 8
    """Passes over the training images."""
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


class Labelled(NamedTuple):
    """Holds images with their labels."""

    images: Tensor
    """(N, C, H, W) uint8."""
    labels: Tensor
    """(N,) int64."""


class DataSet(NamedTuple):
    """Holds what a classifier is trained and tested on."""

    train: Labelled
    test: Labelled
    reference: Tensor
    """Images (M, C, H, W) uint8 that samples are compared with."""
    drawn: Tensor
    """Rows (M,) of them whose statistics are taken: each class as often, since samples are so too."""
    background: int
    """Value of the pixels around what is shown."""
    num_classes: int
    account: dict[str, str]
    """Its name and its licence, and what the reference is."""


def read_data(config: ClassifierTraining) -> DataSet:
    """Read the images that the settings name.

    Raises:
        FileNotFoundError: the folder does not hold them.
    """
    if config.data == "fashion":
        train, test = (
            Labelled(*map(torch.tensor, fashion_mnist.load_fashion_mnist(part, config.data_folder)))
            for part in ("train", "test")
        )
        account = {
            "data_set": "Fashion-MNIST (Zalando Research)",
            "data_set_licence": "MIT",
            "feature_statistics_of": f"the {len(test.images)} test images",
        }
        return DataSet(
            train,
            test,
            test.images,
            torch.arange(len(test.images)),
            0,
            len(fashion_mnist.CLASS_NAMES),
            account,
        )
    images, labels = map(torch.tensor, emoji_data.load_emoji(config.data_folder))
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(images), generator=generator)
    images, labels = images[order], labels[order]
    weight_M = torch.from_numpy(emoji_data.row_weights(labels.numpy()))
    drawn = torch.multinomial(weight_M, len(images), replacement=True, generator=generator)
    is_test = torch.arange(len(images)) % _TEST_EVERY == 0
    account = {
        "data_set": emoji_data.DATA,
        "data_set_licence": "Apache 2.0 and CC BY 4.0",
        "feature_statistics_of": f"{len(images)} draws from as many pictures, each class as likely",
        "test_accuracy_of": "a tenth of the pictures; many differ from one of the others in skin alone",
    }
    return DataSet(
        Labelled(images[~is_test], labels[~is_test]),
        Labelled(images[is_test], labels[is_test]),
        images,
        drawn,
        255,
        len(emoji_data.CLASS_NAMES),
        account,
    )


def _to_input(images_NCHW: Tensor) -> Tensor:
    """Convert uint8 pixels to [-1, 1], in the memory layout that is fast on CPUs."""
    return (images_NCHW.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _shifted(images_NCHW: Tensor, background: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to one pixel, padding with the background."""
    n = len(images_NCHW)
    height, width = images_NCHW.shape[2:]
    windows = F.pad(images_NCHW, (_MAX_SHIFT,) * 4, value=background).unfold(2, height, 1).unfold(3, width, 1)
    y_N, x_N = torch.randint(2 * _MAX_SHIFT + 1, (2, n), generator=generator)
    return windows[torch.arange(n), :, y_N, x_N]


def train_classifier(config: ClassifierTraining, data: DataSet) -> Classifier:
    """Train the classifier and return it in eval mode."""
    images, labels = data.train
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        classifier = Classifier(images.shape[1], data.num_classes)
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
            logits = classifier(_to_input(_shifted(images[rows], data.background, generator)))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=config.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(rows)
        logger.info("epoch %d of %d, loss %.4f", epoch + 1, config.epochs, loss_sum / len(images))
    return classifier.eval()


def write_builtin_reference(folder: Path, data: DataSet) -> None:
    """Write the files of `builtin_reference` to the folder of a classifier."""
    extract = ClassifierFeatures(folder)
    seen = [extract(_to_input(batch)) for batch in data.reference.split(_BATCH)]
    pooled = torch.cat([features.pooled_NF for features in seen])
    spatial = torch.cat([features.spatial_NS for features in seen])
    FeatureStatistics.from_features(pooled[data.drawn]).save(folder / STATISTICS_FILE)
    FeatureStatistics.from_features(spatial[data.drawn]).save(folder / SPATIAL_FILE)
    write_tensors({"features": pooled[:_SHIPPED_IMAGES].half()}, folder / FEATURES_FILE)


def main() -> None:
    """Train the classifier and save it, by the command line's settings."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(ClassifierTraining, description=__doc__)
    config = replace(
        config, out=local(config.out, "out"), data_folder=local(config.data_folder, "data_folder")
    )
    data = read_data(config)
    save_classifier(train_classifier(config, data), config.out)
    # Evaluated as it will be used: after the rounding to half precision.
    _, logits = features_and_logits(load_classifier(config.out), _to_input(data.test.images))
    accuracy = label_accuracy(logits, data.test.labels)
    write_builtin_reference(config.out, data)
    names = ("data", "epochs", "batch_size", "learning_rate", "weight_decay", "label_smoothing", "seed")
    command = ["python", "-m", "pipelines.pretrain.train_classifier"]
    for name in names:
        command += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    about = {
        "test_accuracy": round(accuracy, 4),
        "feature_size": FEATURE_SIZE,
        "trained_with": shlex.join(command),
        **data.account,
    }
    (config.out / CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n")
    logger.info("test accuracy %.4f, wrote %s", accuracy, config.out)


if __name__ == "__main__":
    main()
