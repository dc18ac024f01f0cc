"""Training states on a disk: the newest whole one, whatever happened to the others."""

import logging
from pathlib import Path

import pytest
import torch

from pipelines.run_state.storage import RunStorage
from pipelines.training.checkpoints import FOLDER, Checkpoints


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(RunStorage(str(tmp_path), "r1"))


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "r1" / FOLDER


def state(number: int) -> dict:
    return {"router": {"rows": torch.full((3,), float(number))}, "metrics": [[number, 12, {"loss": 0.5}]]}


def save(checkpoints: Checkpoints, *numbers: int) -> None:
    for number in numbers:
        checkpoints.save(number, state(number))


def loaded(checkpoints: Checkpoints) -> float:
    return checkpoints.load(checkpoints.last())["router"]["rows"][0].item()


def test_the_newest_is_loaded_and_the_last_three_are_kept(checkpoints, folder):
    assert checkpoints.last() == ""
    save(checkpoints, 2, 9, 10, 100)
    assert [int(path.name[:9]) for path in sorted(folder.iterdir())] == [9, 10, 100]
    assert loaded(checkpoints) == 100
    assert checkpoints.load(checkpoints.last())["metrics"] == [[100, 12, {"loss": 0.5}]]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"\0" + data[1:]])
def test_a_damaged_one_is_passed_over_with_a_warning(checkpoints, folder, caplog, damage):
    save(checkpoints, 1, 2, 3)
    newest = sorted(folder.iterdir())[-1]
    newest.write_bytes(damage(newest.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert loaded(checkpoints) == 2
    assert f"{newest.name} is damaged" in caplog.text and "the one before" in caplog.text
    save(checkpoints, 3)  # trained again: the same number, whole
    assert loaded(checkpoints) == 3


def test_what_is_still_being_written_is_not_seen(checkpoints, folder):
    save(checkpoints, 1)
    (folder / "000000002-0123.pt.ab12.tmp").write_bytes(b"half")
    assert loaded(checkpoints) == 1


def test_nothing_is_executed(checkpoints, folder, make_bomb):
    make, marker = make_bomb
    checkpoints.save(1, {"router": make()})
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoints.load(checkpoints.last())
    assert not marker.exists()
