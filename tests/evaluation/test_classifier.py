"""The built-in classifiers as committed, and the statistics beside it."""

import json
from pathlib import Path

import pytest
import torch

from harmonica.builtin import CLASSIFIER, EMOJI_CLASSIFIER
from harmonica.evaluation import fashion_mnist
from harmonica.evaluation.classifier import (
    CONFIG_FILE,
    FEATURE_SIZE,
    STATISTICS_FILE,
    WEIGHTS_FILE,
    Classifier,
    features_and_logits,
    load_classifier,
    save_classifier,
)
from harmonica.evaluation.feature_extractors import ClassifierFeatures
from harmonica.evaluation.feature_statistics import FeatureStatistics
from harmonica.evaluation.image_metrics import frechet_distance, label_accuracy
from harmonica.evaluation.reference_sets import builtin_reference
from pipelines.pretrain import emoji_data


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return load_classifier()


def random_images(n: int) -> torch.Tensor:
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_loads_frozen_float32_in_eval_mode(classifier: Classifier) -> None:
    assert not classifier.training
    parameters = list(classifier.parameters())
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in parameters)
    assert (CLASSIFIER / WEIGHTS_FILE).stat().st_size < 1_000_000


def test_batches_do_not_change_an_image_s_features(classifier: Classifier) -> None:
    images = random_images(7)
    features, logits = features_and_logits(classifier, images, batch_size=3)
    assert features.shape == (7, FEATURE_SIZE) and logits.shape == (7, 10)
    torch.testing.assert_close(features, classifier.features(images))
    torch.testing.assert_close(logits, classifier(images))


def test_save_and_load_round_trip(classifier: Classifier, tmp_path: Path) -> None:
    save_classifier(classifier, tmp_path / "new")
    images = random_images(4)
    assert torch.equal(load_classifier(tmp_path / "new")(images), classifier(images))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give a folder"):
        load_classifier(tmp_path)


def test_statistics_are_the_mean_and_unbiased_covariance(tmp_path: Path) -> None:
    statistics = FeatureStatistics.from_features(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = FeatureStatistics.load(tmp_path / "statistics.safetensors")
    as_double = torch.float64
    assert torch.equal(loaded.mean, torch.tensor([1.0, 3.0], dtype=as_double))
    assert torch.equal(loaded.covariance, torch.tensor([[2.0, 4.0], [4.0, 8.0]], dtype=as_double))
    assert loaded.count == 2


def test_statistics_refuse_a_single_row() -> None:
    with pytest.raises(ValueError, match="N of 2"):
        FeatureStatistics.from_features(torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("folder", "shape", "classes", "accuracy", "count"),
    [
        (CLASSIFIER, (1, 28, 28), fashion_mnist.CLASS_NAMES, 0.91, 10_000),
        (EMOJI_CLASSIFIER, (3, 32, 32), emoji_data.CLASS_NAMES, 0.95, 3_004),
    ],
    ids=["fashion", "emoji"],
)
def test_committed_files_agree_with_each_other(
    folder: Path, shape: tuple[int, ...], classes: tuple[str, ...], accuracy: float, count: int
) -> None:
    about = json.loads((folder / CONFIG_FILE).read_text())
    reference = builtin_reference(folder)
    pooled, spatial, features_MF = reference.pooled, reference.spatial, reference.features_MF
    assert pooled is not None and spatial is not None and features_MF is not None
    assert about["feature_size"] == FEATURE_SIZE == len(pooled.mean) == features_MF.shape[1]
    assert about["test_accuracy"] >= accuracy and str(count) in about["feature_statistics_of"]
    assert pooled.count == spatial.count == count and len(features_MF) == 2_000
    images = torch.rand(200, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = ClassifierFeatures(folder)(images)
    assert noise.logits_NK.shape == (200, len(classes)) and noise.spatial_NS.shape[1] == len(spatial.mean)
    distance = frechet_distance(FeatureStatistics.from_features(noise.pooled_NF), pooled)
    assert distance > 0.2 * pooled.covariance.trace()  # noise shows nothing


def test_evaluates_the_test_images_as_recorded(classifier: Classifier) -> None:
    if not fashion_mnist.DEFAULT_FOLDER.exists():
        pytest.skip(f"needs Fashion-MNIST in {fashion_mnist.DEFAULT_FOLDER}")
    images, labels = map(torch.tensor, fashion_mnist.load_fashion_mnist("test"))
    features, logits = features_and_logits(classifier, images[:2000].float() / 127.5 - 1)
    about = json.loads((CLASSIFIER / CONFIG_FILE).read_text())
    assert label_accuracy(logits, labels[:2000]) == pytest.approx(about["test_accuracy"], abs=0.015)
    reference = FeatureStatistics.load(CLASSIFIER / STATISTICS_FILE)
    distance = frechet_distance(FeatureStatistics.from_features(features), reference)
    assert distance < 0.02 * reference.covariance.trace()
