"""LPIPS and CLIP score with random weights, in the files that the public ones come in."""

from pathlib import Path

import pytest
import torch
from tiny_metric_networks import write_alexnet, write_clip
from tolerances import close
from torch import Tensor

from harmonica.evaluation.perceptual import ClipScore, Lpips


def images(n: int, channels: int = 3, side: int = 70) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> Lpips:
    return Lpips(write_alexnet(tmp_path_factory.mktemp("alexnet") / "alexnet.pth"))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip")


def test_lpips_has_the_file_s_weights_and_torchmetrics_own_layers(lpips: Lpips, tmp_path: Path) -> None:
    state = torch.load(write_alexnet(tmp_path / "a.pth"), weights_only=True)
    torch.testing.assert_close(lpips.network.net.slice3[1].weight, state["features.6.weight"])
    assert (lpips.network.lin0.model[-1].weight >= 0).all(), "trained ones are"


@pytest.mark.parametrize(("channels", "side"), [(3, 70), (1, 28)])
def test_lpips_is_0_for_equals_and_grows_with_the_difference(lpips: Lpips, channels: int, side: int) -> None:
    batch = images(3, channels, side)
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(lpips(batch, batch), torch.zeros(3))
    little, much = (lpips(batch, batch + size * noise) for size in (0.05, 0.5))
    assert (little > 0).all() and (little < much).all()
    near = close(torch.float32, 3456, amplification=10, is_random=True)  # the longest sum of AlexNet's
    torch.testing.assert_close(lpips(batch[:1], batch[:1] + 0.5 * noise[:1]), much[:1], **near)


def test_lpips_of_another_network_is_refused(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"evaluate.lpips_path .* holds another network"):
        Lpips(tmp_path / "other.pth")


def test_clip_score_is_the_cosine_of_clip_s_embeddings(clip_folder: Path) -> None:
    clip, batch, prompts = ClipScore(clip_folder), images(3, 3, 32), ["a dark boot", "a bag", "a pale boot"]
    given = clip.processor(text=prompts, return_tensors="pt", padding=True)
    text = clip.model(pixel_values=torch.zeros(3, 3, 32, 32), **given).text_embeds
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (clip.processor.image_processor.image_mean, clip.processor.image_processor.image_std)
    )
    pixels = ((batch + 1) * 127.5).round() / 255
    seen = clip.model(pixel_values=(pixels - mean) / std, **given).image_embeds
    expected = 100 * torch.cosine_similarity(seen, text).clamp(min=0)
    torch.testing.assert_close(clip(batch, prompts), expected, rtol=1e-4, atol=1e-3)


def test_a_picture_of_the_opposite_scores_0(clip_folder: Path) -> None:
    clip, batch, prompts = ClipScore(clip_folder), images(2, 3, 32), ["a dark boot", "a bag"]
    before = clip(batch, prompts)
    clip.model.visual_projection.weight.neg_()
    after = clip(batch, prompts)
    assert torch.equal(torch.minimum(before, after), torch.zeros(2)), "one of the two points away"
    assert (torch.maximum(before, after) > 0).all()


def test_clip_takes_grey_pictures_and_prompts_of_any_length(clip_folder: Path) -> None:
    scores = ClipScore(clip_folder)(images(2, 1, 28), ["a bag " * 50, ""])
    assert scores.shape == (2,) and scores.isfinite().all()


def test_a_folder_without_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluate.clip_path .* has no config.json"):
        ClipScore(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match=r"evaluate.clip_path .* cannot be loaded"):
        ClipScore(tmp_path)
