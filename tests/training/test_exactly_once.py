"""Metrics of a training that is cut short at any moment are in its file once each."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_dit import write_model

from harmonica.cli.train import _train
from harmonica.cli.training_folder import TrainingFolder
from harmonica.data.samples import SampleSpec, Shard
from harmonica.models.base import BranchedTransformer
from harmonica.models.loading import load_model
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.training.config import TrainingConfig
from harmonica.training.multi_target import MultiTargetTrainer

_CHANGES = ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir")
"""What Python reports before it touches a file, see `sys.addaudithook`."""


class Killed(BaseException):
    """Nothing handles it, so that no more is done than after `kill -9`."""


class _Killer:
    """Lets so many changes to the files of a folder happen; a hook cannot be taken off again: one for all."""

    def __init__(self) -> None:
        self.folder, self.left, self.seen = "", None, 0
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.folder or event not in _CHANGES or not str(arguments[0]).startswith(self.folder):
            return
        if event == "open" and isinstance(arguments[1], str) and arguments[1].startswith("r"):
            return
        self.seen += 1
        if self.left is not None and self.seen > self.left:
            raise Killed

    @contextmanager
    def watching(self, folder: str, left: int | None = None) -> Iterator["_Killer"]:
        self.folder, self.left, self.seen = folder, left, 0
        try:
            yield self
        finally:
            self.folder = ""


@pytest.fixture(scope="module")
def killer() -> _Killer:
    return _Killer()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BranchedTransformer:
    return load_model(write_model(tmp_path_factory.mktemp("model"))).model


def go_on(model: BranchedTransformer, output: Path) -> None:
    """Train in that folder as the command does, from its last state to the end; a state a trajectory."""
    settings = TrainingConfig(trajectories=2, batch_size=2, initial="normal", checkpoint_interval_s=0.0)
    sampler = make_sampler(model, SamplerConfig(num_inference_steps=3))
    run, folder = MultiTargetTrainer(sampler, settings, seed=0), TrainingFolder(output, {"seed": 0})
    folder.load(run)
    folder.mend(run.device)
    _train(run, SampleSpec.of(model, 0), Shard(settings.batch_size), folder, lambda _: None)


def lines_of(folder: Path) -> list[int]:
    return [json.loads(line)["trajectory"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_kill_before_any_change_to_a_file_leaves_each_line_once(
    model: BranchedTransformer, tmp_path: Path, killer: _Killer
) -> None:
    with killer.watching(str(tmp_path / "whole")) as watch:
        go_on(model, tmp_path / "whole")
    changes = watch.seen
    # Of two saves: settings, state and their names, and the lines.
    assert changes >= 2 * 5
    for left in range(changes):
        output = tmp_path / f"killed after {left}"
        with killer.watching(str(output), left), pytest.raises(Killed):
            go_on(model, output)
        go_on(model, output)
        assert lines_of(output) == [1, 2], left


@pytest.mark.parametrize("torn", ["", '{"trajectory": 2, "lo'])
def test_what_was_half_written_is_written_anew(model: BranchedTransformer, tmp_path: Path, torn: str) -> None:
    go_on(model, tmp_path)
    whole = (tmp_path / "metrics.jsonl").read_text()
    first, _, _ = whole.partition("\n")
    (tmp_path / "metrics.jsonl").write_text(f"{first}\n{torn}")
    go_on(model, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_without_a_state_metrics_begin_anew(model: BranchedTransformer, tmp_path: Path) -> None:
    go_on(model, tmp_path)
    (tmp_path / "state.pt").unlink()
    go_on(model, tmp_path)
    assert lines_of(tmp_path) == [1, 2]
