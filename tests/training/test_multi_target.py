"""Routers for several speeds from one training: each as it would be alone, resumed, and what is refused."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from all_phases import ALL_PHASES
from tiny_dit import write_model

from harmonica.cli import train
from harmonica.cli.train import TrainCommand
from harmonica.core.artifact import RouterArtifact
from harmonica.data.samples import SampleSpec, Shard
from harmonica.models.loading import load_model
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.training.config import TrainingConfig
from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.multi_target import MultiTargetTrainer

STEPS = SamplerConfig(num_inference_steps=9, guidance_scale=1.5)
FAMILY = dataclasses.replace(ALL_PHASES, targets=(1.5, 1.3, 1.7, 1.5))
STOPS = [1, 5, 8, 9, 16]
NO_FORECASTS = {"forecast": ForecastConfig(), "choice_trajectories": 0}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory):
    loaded = load_model(write_model(tmp_path_factory.mktemp("model")))
    sampler = make_sampler(loaded.model, STEPS)
    spec = SampleSpec.of(loaded.model, 0)

    def make(config: TrainingConfig) -> tuple[MultiTargetTrainer, SampleSpec]:
        return MultiTargetTrainer(sampler, config, seed=0), spec

    return make


def trained(fresh, config: TrainingConfig) -> MultiTargetTrainer:
    run, spec = fresh(config)
    assert len(list(train.trained(run, spec, Shard(config.batch_size)))) == config.all_trajectories
    return run


def same(one: RouterArtifact, other: RouterArtifact) -> bool:
    return torch.equal(one.logits_TB, other.logits_TB) and torch.equal(one.forecast_TBK, other.forecast_TBK)


@pytest.fixture(scope="module")
def states(fresh) -> dict[int, tuple[Any, Any]]:
    """What a run would be resumed from after so many trajectories, and the rows that are next. The run
    itself, which ends after all of them, is under 0."""
    run, spec = fresh(FAMILY)
    found: dict[int, tuple[Any, Any]] = {}
    for _ in train.trained(run, spec, Shard(FAMILY.batch_size)):
        if run.trajectory in STOPS:
            found[run.trajectory] = copy.deepcopy(run.state()), run.next_trajectories
    return found | {0: (run, None)}


@pytest.fixture(scope="module")
def whole(states) -> MultiTargetTrainer:
    return states[0][0]


def test_each_member_is_bit_for_bit_the_router_trained_alone(fresh, whole):
    family = whole
    assert family.trajectory == FAMILY.all_trajectories == 1 + 3 * (2 + 1 + 4), "the start counts once"
    others = family.extra_artifacts(run_id="r")
    assert list(others) == ["1.5x", "1.7x"]
    for target, artifact in {1.3: family.artifact(), 1.5: others["1.5x"], 1.7: others["1.7x"]}.items():
        alone = trained(fresh, dataclasses.replace(ALL_PHASES, target_speedup=target)).artifact()
        assert same(artifact, alone) and artifact.plan == alone.plan
        assert artifact.ideal_speedup == pytest.approx(target, rel=0.02)
    assert others["1.7x"].training["target_speedup"] == 1.7


def test_a_start_that_is_not_measured_is_none_to_share(fresh):
    settings = {"initial": "even", "start_trajectories": 0}
    config = dataclasses.replace(FAMILY, **settings, **NO_FORECASTS)
    others = trained(fresh, config).extra_artifacts()
    alone = dataclasses.replace(ALL_PHASES, **settings, **NO_FORECASTS, target_speedup=1.5)
    assert torch.equal(others["1.5x"].logits_TB, trained(fresh, alone).artifact().logits_TB)


@pytest.mark.parametrize("stop", STOPS)
def test_it_resumes_bit_for_bit_within_any_member(fresh, whole, states, stop):
    state, next_trajectories = states[stop]
    resumed, spec = fresh(FAMILY)
    resumed.load_state(copy.deepcopy(state))
    assert resumed.trajectory == stop and resumed.next_trajectories == next_trajectories
    list(train.trained(resumed, spec, Shard(2)))
    assert same(resumed.artifact(), whole.artifact())
    for name, artifact in whole.extra_artifacts().items():
        assert same(resumed.extra_artifacts()[name], artifact)


def test_its_curves_say_which_speed_they_are_of(fresh):
    run, spec = fresh(dataclasses.replace(FAMILY, **NO_FORECASTS))
    speeds = [metrics["target_speedup"] for metrics in train.trained(run, spec, Shard(2))]
    assert speeds == [1.3] * 3 + [1.5] * 2 + [1.7] * 2
    alone, spec = fresh(dataclasses.replace(ALL_PHASES, **NO_FORECASTS))
    assert all("target_speedup" not in metrics for metrics in train.trained(alone, spec, Shard(2)))


def test_the_command_leaves_a_folder_for_each(tmp_path: Path):
    model = write_model(tmp_path / "model")
    command = TrainCommand(output=tmp_path / "run", model=model, sampler=STEPS, train=FAMILY)
    train.train(command, lambda _: None)
    found = {
        path.parent.name: RouterArtifact.load(path.parent) for path in tmp_path.glob("run/*/*/config.json")
    }
    assert sorted(found) == ["1.5x", "1.7x"]
    curs = [
        RouterArtifact.load(tmp_path / "run" / "router").plan.cur,
        *(found[n].plan.cur for n in sorted(found)),
    ]
    assert np.all(np.diff(curs) > 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_speedup": 0.0, "target_cur": 0.3, "initial": "constant", "start_trajectories": 0}, "1.5"),
        ({"targets": (1.5, 1.0)}, r"\(1.5, 1.0\): give at most 20 numbers above 1"),
        ({"targets": tuple(1 + k / 40 for k in range(1, 30))}, "give at most 20 numbers above 1"),
    ],
)
def test_targets_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ValueError, match=f"train.targets is .*{words}"):
        dataclasses.replace(FAMILY, **settings)
