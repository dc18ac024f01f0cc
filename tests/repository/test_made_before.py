"""Artifacts, runs and champions made before still load; `assets/made_before` has some of older versions.

`router_format_1` is the first built-in champion (commit 12f5d17). The rest was made by commit 2bfb485:
`training` is what `harmonica train` had written after 4 of 10 trajectories, in the router's own training,
with the artifact that it came to uninterrupted in `expected`; `run/config.json` is what the workflow records.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from tolerances import of_training

from harmonica.builtin import CHAMPION, EMOJI_CHAMPION, EMOJI_DIT, FASHION_DIT
from harmonica.cli import train
from harmonica.cli.train import TrainCommand
from harmonica.core.artifact import RouterArtifact
from harmonica.models.loading import ModelConfig, load_model
from harmonica.samplers import SamplerConfig
from harmonica.training.config import TrainingConfig
from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.sdt_config import SdtConfig
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.workflow import TrainConfig
from pipelines.presets import PRESETS
from pipelines.run_state import resume
from pipelines.run_state.storage import RunStorage

Settings = TypeVar("Settings")
BEFORE = Path(__file__).parents[1] / "assets" / "made_before"


def test_an_artifact_of_the_first_format_fits_the_built_in_model():
    """Its config.json lacks `norm_eps`, `rounded_weights`, `cache_bytes` and a sampler's `scheduler`."""
    config = json.loads((BEFORE / "router_format_1" / "config.json").read_text())
    assert config["format_version"] == 1 and "rounded_weights" not in config
    artifact = RouterArtifact.load(BEFORE / "router_format_1")
    assert artifact.plan.to_strings() == config["plan"]
    assert artifact.reuse == config["reuse"] and artifact.forecast_TBK is None
    artifact.check(load_model(ModelConfig()).model, SamplerConfig(**config["sampler"]))


@pytest.mark.parametrize(
    ("folder", "version"),
    [(CHAMPION, 3), (EMOJI_CHAMPION, 3), (BEFORE / "training" / "expected", 2)],
    ids=["champion", "emoji-champion", "expected"],
)
def test_an_artifact_is_written_again_as_it_was_read(folder, version, tmp_path):
    artifact = RouterArtifact.load(folder)
    artifact.save(tmp_path)
    before, now = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path))
    del before["versions"], now["versions"]
    assert now == before and now["format_version"] == version


def test_an_artifact_of_a_later_format_is_refused(tmp_path):
    shutil.copytree(CHAMPION, tmp_path / "router")
    path = tmp_path / "router" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 5}))
    with pytest.raises(ValueError, match=r"has format_version 5, this version reads 1 to 4: install the"):
        RouterArtifact.load(tmp_path / "router")


def settings_of(recorded: dict[str, Any], kind: type[Settings]) -> Settings:
    """Settings as a JSON file records them, which knows no tuples."""
    parts = {"sdt": SdtConfig, "forecast": ForecastConfig}
    values = {name: parts[name](**value) if name in parts else value for name, value in recorded.items()}
    return kind(**{name: tuple(one) if isinstance(one, list) else one for name, one in values.items()})


def command(folder: Path) -> TrainCommand:
    """As `training/settings.json` has it."""
    recorded = json.loads((BEFORE / "training" / "settings.json").read_text())
    return TrainCommand(
        output=folder,
        sampler=SamplerConfig(**recorded["sampler"]),
        train=settings_of(recorded["train"], TrainingConfig),
        seed=recorded["seed"],
    )


def test_a_training_that_was_begun_before_goes_on(tmp_path):
    for name in ("state.pt", "settings.json", "metrics.jsonl"):
        shutil.copy(BEFORE / "training" / name, tmp_path)
    expected = RouterArtifact.load(BEFORE / "training" / "expected")
    artifact = train.train(command(tmp_path), lambda text: None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["trajectory"] for line in lines] == list(range(1, 11)), "the first four are those of before"
    assert artifact.plan.to_strings() == expected.plan.to_strings()
    torch.testing.assert_close(artifact.logits_TB, expected.logits_TB, **of_training(0.1, 3))


def test_a_run_that_was_begun_before_goes_on(tmp_path):
    """Its settings are held against today's; what it has finished stays finished."""
    folder = tmp_path / "before"
    shutil.copytree(BEFORE / "run", folder)
    shutil.copytree(CHAMPION, folder / "router")
    shutil.copy(CHAMPION / "report.json", folder)
    storage = RunStorage(str(tmp_path), "before")
    recorded = json.loads((folder / "config.json").read_text())
    config = dataclasses.replace(
        PRESETS["fashion"](),
        run_id="before",
        storage_path=str(tmp_path),
        train=settings_of(recorded["train"], TrainConfig),
        evaluate=settings_of(recorded["evaluate"], EvaluateConfig),
    )
    resume.check(config, storage)
    done = [stage for stage in config.stages if resume.is_finished(stage, config, storage)]
    assert done == ["train", "evaluate"]
    with pytest.raises(ValueError, match=r"^seed was 0 and is 1: resume run_id before with its own"):
        resume.check(dataclasses.replace(config, seed=1), storage)


def test_the_built_in_models_are_those_that_routers_name():
    """Every committed router is of a built-in DiT, whose identity must therefore not change."""
    of_fashion = (CHAMPION, BEFORE / "router_format_1", BEFORE / "training" / "expected")
    for path, folders in ((FASHION_DIT, of_fashion), (EMOJI_DIT, (EMOJI_CHAMPION,))):
        identity = load_model(ModelConfig(path=str(path))).model.identity()
        for folder in folders:
            assert RouterArtifact.load(folder).model == identity
