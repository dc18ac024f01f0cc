"""Learned forecasts in artifacts and in settings: kept, and refused where they have no meaning."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forecast_fits import FIT, STEPS, alternating
from latent_rows import rows

from harmonica.core.artifact import RouterArtifact
from harmonica.core.plan import Plan
from harmonica.core.router import Router
from harmonica.core.sampling import sample
from harmonica.core.segments import with_segments
from harmonica.data.batch import Batch
from harmonica.samplers.noise import SampleKeys
from harmonica.training.config import TrainingConfig
from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.plans.fitted_weights import linear_weights
from harmonica.training.plans.forecast_fit import ForecastFit
from harmonica.training.sampler_backend import SamplerBackend


def test_an_artifact_keeps_its_forecast(sampler, tmp_path: Path):
    weights = linear_weights(alternating(), 2) + 0.1
    logits = Router.alternating(STEPS, 6, 1.0).logits()
    made = RouterArtifact.build(
        logits, sampler, threshold=0.5, reuse="forecast", training={}, forecast_TBK=weights
    )
    read = RouterArtifact.load(made.save(tmp_path))
    assert torch.equal(read.forecast_TBK, weights.float()) and read.plan == made.plan
    plain = RouterArtifact.build(logits, sampler, threshold=0.5, reuse="forecast", training={})
    assert made.cache_bytes == 1.5 * plain.cache_bytes, "three sums, not two"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format_version"] == 2, "what reads version 1 alone would draw something else"
    inputs = (rows(0).noise_NCHW, rows(0).condition_N)
    drawn = sample(sampler, *inputs, read.plan, reuse=read.reuse)
    assert not torch.allclose(drawn, sample(sampler, *inputs, plain.plan, reuse="forecast"))


def test_an_artifact_keeps_its_segments(sampler, tmp_path: Path):
    plan = with_segments(alternating(), sampler.model)
    weights_TBK = 0.1 + linear_weights(plan, 2).repeat(1, 6, 1)
    made = RouterArtifact.build(
        Router.alternating(STEPS, 6, 1.0).logits(),
        sampler,
        threshold=0.5,
        reuse="forecast",
        training={},
        forecast_TBK=weights_TBK,
        segments=plan.segments,
    )
    read = RouterArtifact.load(made.save(tmp_path))
    assert read.plan == made.plan and read.plan.segments == (0,)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format_version"] == 4, "what reads version 3 would forecast each branch alone"
    inputs = (rows(0).noise_NCHW, rows(0).condition_N)
    alone = replace(read.plan, segments=None)
    drawn = sample(sampler, *inputs, read.plan, reuse=read.reuse)
    assert not torch.allclose(drawn, sample(sampler, *inputs, alone, reuse=read.reuse))
    (tmp_path / "config.json").write_text(json.dumps(config | {"segments": [0, 9]}))
    with pytest.raises(ValueError, match=r"segments begin at \(0, 9\)"):
        RouterArtifact.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trajectories": -1}, "forecast.trajectories is -1"),
        ({"trajectories": 3}, "give 4 or more"),
        ({"order": 0}, "forecast.order is 0"),
        ({"rows_at_once": 0}, "forecast.rows_at_once is 0"),
    ],
)
def test_bad_settings_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        ForecastConfig(**changes)


@pytest.mark.parametrize(
    ("trajectories", "rounds", "expected"),
    [
        (4, 1, "mmmT"),
        (7, 2, "mmmmmmT"),
        (8, 2, "mmmT mmmT"),
        (13, 2, "mmmmmmT mmmmmT"),
        (24, 2, 2 * "mmmmmmmmmmTT "),
    ],
)
def test_a_round_takes_four_trajectories_and_tries_with_its_last(trajectories, rounds, expected):
    config = ForecastConfig(trajectories=trajectories, rounds=rounds)
    places = ["mT"[config.is_tried(k)] + " " * config.ends_round(k + 1) for k in range(trajectories)]
    assert "".join(places).strip() == expected.strip()


def test_a_plan_that_reuses_nothing_has_nothing_to_fit(tiny_sampler, batch):
    fit = ForecastFit(Plan.full(tiny_sampler.num_steps, 6), ForecastConfig(trajectories=4, probes=2))
    noise, labels = batch
    for k in range(4):
        parts = [Batch(noise, labels, SampleKeys.of(0, range(4 * k, 4 * k + 4)))]
        assert fit.observe(SamplerBackend(tiny_sampler), parts, lambda tensor: None)["loss"] < 1e-20
    assert not fit.weights.forecast_TUK.any()


def test_values_that_are_held_have_no_forecast():
    with pytest.raises(ValueError, match=r"train\.sdt\.reuse is hold: give reuse forecast"):
        TrainingConfig(forecast=FIT)


def test_a_forecast_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="another shape than the plan"):
        Plan(((True,), (True,)), (((0.5,),),))
