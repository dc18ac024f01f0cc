"""The colour model's data and training: what is read of the archives, what is drawn, what is exported."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from harmonica.models.loading import ModelConfig, load_model
from pipelines.pretrain import emoji_data
from pipelines.pretrain.dit import export
from pipelines.pretrain.emoji import EMOJI_DIT, EmojiPretrainConfig, EmojiTask
from pipelines.pretrain.learning import Learner, NoisyBatch
from pipelines.pretrain.train_classifier import ClassifierTraining, read_data, train_classifier

RED, CLEAR = (255, 0, 0, 255), (0, 0, 0, 0)


def png(colour: tuple[int, int, int, int]) -> bytes:
    target = io.BytesIO()
    Image.new("RGBA", (64, 64), colour).save(target, "PNG")
    return target.getvalue()


def write_archive(
    folder: Path, vendor: str, pictures: dict[str, bytes], entries: list[dict[str, Any]]
) -> None:
    files = {f"package/img/{vendor}/64/{name}": content for name, content in pictures.items()}
    files["package/emoji.json"] = json.dumps(entries).encode()
    files[f"package/img/{vendor}/sheets/64.png"] = png(RED)
    with tarfile.open(folder / f"emoji-datasource-{vendor}-16.0.0.tgz", "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """Pictures of each vendor: a red heart, a transparent bird, a hand in two skins; others of no class."""
    entries = [
        {"image": "2764.png", "name": "HEAVY BLACK HEART", "subcategory": "heart"},
        {"image": "1f426.png", "name": "BIRD", "subcategory": "animal-bird"},
        {"image": "1f3f4.png", "name": "ENGLAND FLAG", "subcategory": "subdivision-flag"},
        {"image": "1f405.png", "name": "TIGER", "subcategory": "animal-mammal"},
        {"image": "lost.png", "name": "BROKEN HEART", "subcategory": "heart"},
        {
            "image": "270b.png",
            "name": "RAISED HAND",
            "subcategory": "hand-fingers-open",
            "skin_variations": {"1F3FB": {"image": "270b-1f3fb.png"}, "1F3FC": {"image": "lost-too.png"}},
        },
    ]
    names = ("2764", "1f426", "1f3f4", "1f405", "270b", "270b-1f3fb")
    pictures = {f"{name}.png": png(CLEAR if name == "1f426" else RED) for name in names}
    for vendor in emoji_data.VENDORS:
        write_archive(tmp_path, vendor, pictures, entries)
    return tmp_path


def test_pictures_of_both_vendors_lie_on_white_with_the_labels_of_their_classes(archives: Path) -> None:
    images, labels = emoji_data.load_emoji(archives)
    bird, heart, hand = (emoji_data.CLASS_NAMES.index(name) for name in ("bird", "heart", "hand"))
    assert images.shape == (8, 3, emoji_data.SIDE, emoji_data.SIDE) and images.dtype == np.uint8
    assert labels.tolist() == [bird, hand, hand, heart] * 2
    assert (images[0] == 255).all()
    assert (images[3][0] == 255).all() and (images[3][1:] == 0).all()


def test_a_classifier_is_tested_on_a_tenth_of_the_pictures_and_compares_with_all(archives: Path) -> None:
    config = ClassifierTraining(data="emoji", data_folder=archives, epochs=1, batch_size=4)
    data = read_data(config)
    assert [len(part.images) for part in (data.train, data.test)] == [7, 1]
    together = torch.cat([data.train.images, data.test.images])
    assert sorted(together.sum((1, 2, 3)).tolist()) == sorted(data.reference.sum((1, 2, 3)).tolist())
    classifier = train_classifier(config, data)
    assert classifier(data.reference.float()).shape == (8, len(emoji_data.CLASS_NAMES))


def test_an_archive_that_is_missing_or_of_something_else_is_named(archives: Path, tmp_path: Path) -> None:
    (archives / "emoji-datasource-twitter-16.0.0.tgz").unlink()
    with pytest.raises(FileNotFoundError, match=r"npm pack emoji-datasource-twitter@16\.0\.0"):
        emoji_data.load_emoji(archives)
    write_archive(archives, "twitter", {}, [])
    with pytest.raises(ValueError, match=r"twitter-16\.0\.0\.tgz has none of the pictures"):
        emoji_data.load_emoji(archives)


def test_every_class_is_drawn_as_often_however_many_pictures_it_has() -> None:
    labels = np.repeat(np.arange(len(emoji_data.CLASS_NAMES)), 2)
    labels = np.concatenate([labels, np.zeros(1000, np.int64)])
    labels = np.random.default_rng(1).permutation(labels)
    task = EmojiTask(EmojiPretrainConfig(batch_size=11_000), np.zeros((len(labels), 1), np.uint8), labels)
    rows = task.draw_rows(np.random.default_rng(0))
    counts = np.bincount(labels[rows], minlength=len(emoji_data.CLASS_NAMES))
    mean = len(rows) / len(counts)
    # Five standard deviations of a binomial count; drawn by rows, class 0 would have nearly all.
    assert (abs(counts - mean) < 5 * mean**0.5).all()
    assert len(np.unique(rows)) > 300  # of the 1,002 of class 0, some 500 draws find about 390


def test_a_wrong_noise_weighs_more_where_there_is_more_of_it() -> None:
    task = EmojiTask(EmojiPretrainConfig(), np.zeros((1, 3, 4, 4), np.uint8), np.zeros(1, np.int64))
    noise = torch.zeros(1, 3, 4, 4)

    def error(timestep: int) -> float:
        batch = NoisyBatch(noise, torch.tensor([timestep]), noise)
        return float(task.error(torch.ones_like(noise), batch))

    assert error(999) == pytest.approx(21)  # that of the noise, 1, and that of x_0, with its largest weight
    assert error(0) == pytest.approx(1, abs=1e-3)


def test_the_colour_model_learns_a_step_and_is_exported_with_its_licences(
    archives: Path, tmp_path: Path
) -> None:
    shape = replace(EMOJI_DIT, num_layers=1)
    folder = tmp_path / "model"
    config = EmojiPretrainConfig(
        batch_size=4, model=shape, storage_path=str(tmp_path), export=str(folder), data_folder=str(archives)
    )
    task = EmojiTask(config, *EmojiTask.load(archives))
    learner = Learner(task.make_model(), config)
    rows, generator = task.batch(0, 0, 1)
    clean = torch.from_numpy(task.images[rows]).float() / 127.5 - 1
    learner.learn(task.loss(learner.model, clean, rows, generator))
    checkpoint = tmp_path / config.run_id / "checkpoint_1"
    checkpoint.mkdir(parents=True)
    torch.save(learner.state_dict(), checkpoint / "state.pt")
    export(config, emoji_data.CLASS_NAMES, command="python -m pipelines.pretrain.emoji", data=emoji_data.DATA)
    loaded = load_model(ModelConfig(path=str(folder)))
    assert loaded.class_names == emoji_data.CLASS_NAMES and loaded.model.in_channels == 3
    account = json.loads((folder / "config.json").read_text())
    assert "CC BY 4.0" in account["data"] and account["training"]["steps_done"] == 1
