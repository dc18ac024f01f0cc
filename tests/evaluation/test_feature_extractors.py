"""The classifier and Inception as feature extractors; Inception with random weights in the public layout."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_metric_networks import write_inception
from torch import Tensor

from harmonica.evaluation.classifier import features_and_logits, load_classifier
from harmonica.evaluation.feature_extractors import ClassifierFeatures, InceptionFeatures


def images(n: int, channels: int, side: int) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def assert_places_then_channels(found_NS: Tensor, activations_NCHW: Tensor, channels: int) -> None:
    _, _, height, width = activations_NCHW.shape
    position = 0
    for row in range(height):
        for column in range(width):
            for channel in range(channels):
                torch.testing.assert_close(found_NS[:, position], activations_NCHW[:, channel, row, column])
                position += 1
    assert position == found_NS.shape[1] and found_NS.std() > 0


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


def test_the_classifier_s_features_and_its_middle() -> None:
    batch = images(5, 1, 28)
    found = ClassifierFeatures()(batch)
    pooled, logits = features_and_logits(load_classifier(), batch)
    assert torch.equal(found.pooled_NF, pooled) and torch.equal(found.logits_NK, logits)
    activations = load_classifier().backbone[:4](batch)
    assert found.spatial_NS.shape == (5, 98)
    assert_places_then_channels(found.spatial_NS, activations, 2)


def test_inception_s_features_are_torch_fidelity_s(weights: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    extractor, batch = InceptionFeatures(weights), images(2, 3, 40)
    found = extractor(batch)
    network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(weights))
    pixels = ((batch + 1) * 127.5).round().byte()
    given: list[Tensor] = []
    network.Mixed_6d.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    pooled, logits = network(pixels)
    assert torch.equal(found.pooled_NF, pooled) and torch.equal(found.logits_NK, logits)
    assert found.pooled_NF.shape == (2, 2048) and found.logits_NK.shape == (2, 1008)
    assert found.spatial_NS.shape == (2, 2023)
    assert_places_then_channels(found.spatial_NS, network.Mixed_6d.branch1x1(given[0]), 7)
    again = extractor.of_pixels(pixels)
    assert torch.equal(again.spatial_NS, found.spatial_NS)


def test_inception_sees_grey_pictures_as_rgb(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "w.safetensors")
    extractor, grey = InceptionFeatures(tmp_path / "w.safetensors"), images(1, 1, 28)
    assert torch.equal(extractor(grey).pooled_NF, extractor(grey.repeat(1, 3, 1, 1)).pooled_NF)


def test_weights_that_would_run_code_are_refused(tmp_path: Path, make_bomb) -> None:
    bomb, marker = make_bomb
    torch.save({"fc.weight": bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        InceptionFeatures(tmp_path / "bomb.pth")
    assert not marker.exists()


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"evaluate.inception_path .* holds another network"):
        InceptionFeatures(tmp_path / "other.pth")
