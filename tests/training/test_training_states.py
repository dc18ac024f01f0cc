"""Training states that the release before wrote are loaded, kept as they are, and gone on from."""

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from all_phases import ALL_PHASES
from tolerances import of_training
from torch import Tensor

from harmonica.cli.train import trained
from harmonica.data.samples import SampleSpec, Shard
from harmonica.models.base import freeze
from harmonica.models.dit.model import DiT, DiTConfig
from harmonica.samplers import Sampler, SamplerConfig, make_sampler
from harmonica.training.config import TrainingConfig
from harmonica.training.multi_target import MultiTargetTrainer
from harmonica.training.sdt_config import SdtConfig

RECORDED = json.loads(Path(__file__).parents[1].joinpath("assets/training_states.json").read_text())
"""By configuration: the states after some trajectories, and the names of every trajectory's metrics.

Written at commit 4dbd9a3, before a training had phase objects. Bits of floats are kept by JSON.
"""
ONE_FITTED = dataclasses.replace(ALL_PHASES, forecast=dataclasses.replace(ALL_PHASES.forecast, finalists=1))
"""As then: which of two plans a fit goes on with follows from how it begins, which is not as it was."""
CONFIGS = {
    "all phases, two targets": dataclasses.replace(
        ONE_FITTED, start_trajectories=2, choice_trajectories=2, targets=(1.5,)
    ),
    "target_psnr": dataclasses.replace(ONE_FITTED, target_speedup=0.0, target_psnr=20.0),
    "target_cur": TrainingConfig(
        trajectories=3, batch_size=2, iepo_every=2, target_cur=0.3, sdt=SdtConfig(threshold=0.5)
    ),
    "router alone": TrainingConfig(trajectories=3, batch_size=2, iepo_every=2),
}
STOPS = [(name, int(stop)) for name, recorded in RECORDED.items() for stop in recorded["states"]]


def decode(value: Any) -> Any:
    if isinstance(value, list):
        return [decode(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "pairs" in value:
        return {key: decode(each) for key, each in value["pairs"]}
    if "tuple" in value:
        return tuple(decode(each) for each in value["tuple"])
    return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"])).reshape(value["shape"])


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Every tensor and plain value but None by its path; an empty dict or list is a leaf too."""
    if value is None:  # as the states of phases that a training has not
        return {}
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    inner = [leaf for key, each in items for leaf in leaves(each, f"{name}/{key}").items()]
    return dict(inner) or {name: value}


def with_one_sum(state: dict[str, Any]) -> dict[str, Any]:
    """The state with the normal equations of a fit added up, which were kept in four parts."""
    state = copy.deepcopy(state)
    for member in state["members"]:
        if fit := member.get("forecast"):
            parts = zip(*fit["folds"], strict=True)
            fit["folds"] = [tuple(torch.stack([*each]).sum(0) for each in parts)]
    return state


def kept_leaves(state: dict[str, Any]) -> dict[str, Any]:
    """What a release goes on from: not the form of the start, which was of another kind.

    A fit that begins after the state was written has a correction, finalists and sums by which these are
    compared, which were none of theirs; nor did they keep what a target of quality has led to.
    """
    return {
        path: leaf
        for path, leaf in leaves(with_one_sum(state)).items()
        if not re.search("/search|/starts/measured_|/found/|/finalists/|/forecast/(correction|reached)", path)
    }


def recorded_state(name: str, stop: int) -> dict[str, Any]:
    return decode(RECORDED[name]["states"][str(stop)])


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    shape = {"sample_size": 8, "patch_size": 4, "in_channels": 1, "out_channels": 1}
    model = DiT(
        DiTConfig(**shape, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_embeds_ada_norm=3)
    )
    model.initialize(torch.Generator().manual_seed(0), zero=False)
    freeze(model)
    return make_sampler(model, SamplerConfig(num_inference_steps=7, guidance_scale=1.5))


def go_on(run: MultiTargetTrainer) -> list[dict[str, float]]:
    spec = SampleSpec.of(run.sampler.model, 0)
    return list(trained(run, spec, Shard(run.config.batch_size)))


@pytest.mark.parametrize(("name", "stop"), STOPS)
def test_a_recorded_state_is_kept_as_it_is(sampler: Sampler, name: str, stop: int) -> None:
    run, state = MultiTargetTrainer(sampler, CONFIGS[name], seed=0), recorded_state(name, stop)
    run.load_state(copy.deepcopy(state))
    assert run.trajectory == stop
    ours, theirs = kept_leaves(run.state()), kept_leaves(state)
    assert ours.keys() == theirs.keys()
    for path, expected in theirs.items():
        found = ours[path]
        assert type(found) is type(expected), path
        if isinstance(expected, Tensor):
            assert found.dtype == expected.dtype and torch.equal(found, expected), path
        else:
            assert found == expected, path


def test_what_a_quality_has_led_to_is_said_and_kept(sampler: Sampler) -> None:
    run, config = MultiTargetTrainer(sampler, CONFIGS["target_psnr"], seed=0), CONFIGS["target_psnr"]
    left = trained(run, SampleSpec.of(sampler.model, 0), Shard(config.batch_size))
    for _ in range(config.start_trajectories):
        assert not run.announcement
        metrics = next(left)
    found = run.artifact().training["found"]
    assert (found["psnr"], found["macs_speedup"]) == (metrics["psnr"], metrics["target_speedup"])
    assert run.announcement == (
        f"train.target_psnr is 20: the fastest start that has it reuses {found['reused_steps']} of 7 steps, "
        f"at {found['psnr']:.1f} dB and {found['macs_speedup']:.3g}x in MACs"
    )
    resumed = MultiTargetTrainer(sampler, config, seed=0)
    resumed.load_state(copy.deepcopy(run.state()))
    assert resumed.artifact().training["found"] == found


@pytest.mark.parametrize(("name", "stop"), STOPS)
def test_a_recorded_state_is_gone_on_from(sampler: Sampler, name: str, stop: int) -> None:
    config = CONFIGS[name]
    run = MultiTargetTrainer(sampler, config, seed=0)
    run.load_state(recorded_state(name, stop))
    # What was measured of the start was of another kind: starts under other ridges were not compared then.
    found = [sorted(name for name in one if not re.search("measured_[0-9ln]", name)) for one in go_on(run)]
    assert found == RECORDED[name]["metrics"][stop:], "metrics keep their names"
    ours, theirs = kept_leaves(run.state()), kept_leaves(recorded_state(name, config.all_trajectories))
    assert ours.keys() == theirs.keys()
    near = of_training(config.sdt.learning_rate, config.trajectories)  # on a CPU other than the recording's
    for path, expected in theirs.items():
        if "/router/" in path:
            if stop < config.start_trajectories:  # what is left of the start is measured in another way
                continue
            torch.testing.assert_close(ours[path], expected, **near)
        elif not path.endswith("/chosen") and not isinstance(expected, Tensor | float):
            assert ours[path] == expected, path
