"""Pictures: right pixels, right files, no pyplot."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harmonica.evaluation.differences import amplification, with_differences
from harmonica.evaluation.plots import (
    cached_title,
    encode_picture,
    router_heat_map,
    sample_sheet,
    to_pil,
    to_uint8,
)


def test_pixels_cover_the_range_and_clip() -> None:
    images = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 1, 5)
    pixels = to_uint8(images)
    assert pixels.shape == (1, 1, 5, 1) and pixels.dtype == np.uint8
    assert pixels.ravel().tolist() == [0, 0, 128, 255, 255]


def test_every_pixel_value_survives_the_round_trip() -> None:
    values = torch.arange(256).reshape(1, 1, 16, 16)
    assert (to_uint8(values / 127.5 - 1).squeeze() == values.squeeze().numpy()).all()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_holds_the_pixels(channels: int, mode: str) -> None:
    image = torch.rand(channels, 6, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    decoded = Image.open(io.BytesIO(encode_picture(image)))
    assert (decoded.format, decoded.mode, decoded.size) == ("PNG", mode, (4, 6))
    assert np.array_equal(np.asarray(decoded), np.asarray(to_pil(image)))


def test_sample_sheet_shows_each_image_in_its_place(tmp_path: Path) -> None:
    levels = torch.tensor([[-1.0, -0.5], [0.25, 0.75]])
    rows = {
        name: level[:, None, None, None].expand(2, 1, 28, 28)
        for name, level in zip(("full", "cached"), levels, strict=True)
    }
    figure = sample_sheet(rows, ["Trouser", "Bag"], tmp_path / "sheet.png", title="Same noise")
    assert [text.get_text() for text in figure.texts] == ["Same noise", "full", "cached"]
    assert [axes.get_title() for axes in figure.axes] == ["Trouser", "Bag", "", ""]
    for text, axes in zip(figure.texts[1:], figure.axes[::2], strict=True):
        assert axes.get_position().y0 < text.get_position()[1] < axes.get_position().y1
    assert figure.axes[0].get_position().y0 > figure.axes[2].get_position().y1
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    height, width = sheet.shape
    for axes, level in zip(figure.axes, levels.flatten(), strict=True):
        box = axes.get_position()
        x, y = int((box.x0 + box.x1) / 2 * width), int((1 - (box.y0 + box.y1) / 2) * height)
        assert sheet[y, x] == pytest.approx((level + 1) * 127.5, abs=1)


def test_sample_sheet_refuses_a_short_row() -> None:
    with pytest.raises(ValueError, match=r"row 'full' has shape \(2, 1, 28, 28\) for 3 column names"):
        sample_sheet({"full": torch.zeros(2, 1, 28, 28)}, ["a", "b", "c"])


def test_differences_are_amplified_by_the_factor_that_their_labels_say() -> None:
    full = torch.linspace(-0.9, 0.9, 200).reshape(2, 1, 10, 10)
    near, far = full + 0.004, full - 0.018
    near[0, 0, 0, 0] += 0.5  # one pixel of 400 does not decide for all
    sheet = with_differences(
        {"full, 20 steps": full, "cached, CUR 45%\nlearned steps": near, "13 steps": far}
    )
    names = list(sheet)
    assert names == [
        "full, 20 steps",
        "cached, CUR 45%\nlearned steps",
        "cached minus full,\ntimes 50",
        "13 steps",
        "13 steps minus full,\ntimes 50",
    ]
    assert torch.equal(sheet[names[1]], near) and torch.equal(sheet[names[3]], far)
    shown = sheet[names[2]].flatten()
    assert shown[1:].tolist() == pytest.approx([0.2] * 199, abs=1e-4)
    assert sheet[names[4]].flatten().tolist() == pytest.approx([-0.9] * 200, abs=1e-4)
    assert (to_uint8(sheet[names[4]]) == 13).all(), "below mid grey, by as much as the factor says"
    assert with_differences({"full": full}).keys() == {"full"}


@pytest.mark.parametrize(
    ("size", "factor"), [(0.6, 1), (0.5, 2), (0.11, 5), (0.0999, 10), (1.7, 1), (0, 1000)]
)
def test_amplification_keeps_differences_within_the_grey_levels(size: float, factor: int) -> None:
    differences = torch.full((3, 1, 4, 4), size)
    differences[0] = -size
    assert amplification(differences) == factor


def test_a_row_of_cached_images_says_how_its_plan_came_about() -> None:
    title = cached_title("cached 1.5x", 0.449, "learned steps + fitted forecast + trained router")
    assert title == "cached 1.5x, CUR 45%\nlearned steps +\nfitted forecast +\ntrained router"


def test_heat_map_puts_the_first_run_step_on_top_and_marks_reuse(tmp_path: Path) -> None:
    scores = torch.tensor([[0.1, 0.9], [0.2, 0.3], [1.0, 1.0]])
    figure = router_heat_map(scores, scores > 0.25, ["attn 0", "mlp 0"], tmp_path / "router.png")
    axes = figure.axes[0]
    np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), scores.numpy())
    assert axes.transData.transform((0, 2))[1] > axes.transData.transform((0, 0))[1]
    assert np.asarray(axes.collections[0].get_offsets()).tolist() == [[0, 0], [0, 1]]  # (branch, step)
    assert axes.get_title("left") == "CUR 33.3%"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["attn 0", "mlp 0"]
    assert Image.open(tmp_path / "router.png").format == "PNG"


def test_heat_map_of_many_steps_labels_the_first_run_one() -> None:
    scores = torch.ones(250, 4)
    figure = router_heat_map(scores, scores > 0.5, list("abcd"))
    assert figure.axes[0].get_yticklabels()[-1].get_text() == "249"


def test_heat_map_refuses_a_plan_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"scores have shape \(3, 2\), the plan \(2, 2\)"):
        router_heat_map(torch.ones(3, 2), torch.ones(2, 2, dtype=torch.bool), ["a", "b"])


def test_prompts_above_a_sheet_stay_within_their_columns() -> None:
    names = ["Bag", "a studio photo of a light coat and much else that goes on"]
    figure = sample_sheet({"full": torch.zeros(2, 1, 28, 28)}, names)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["Bag", "a studio photo\nof a light coat\nand much ..."]
    for axes in figure.axes:
        box, text = axes.get_position(), axes.title.get_window_extent()
        assert text.width < 1.15 * box.width * figure.bbox.width
        assert text.y1 < figure.bbox.height
