"""The verdict on a router, and the built-in router on the built-in model."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from harmonica.builtin import CHAMPION
from harmonica.core.artifact import RouterArtifact
from harmonica.core.sampling import sample
from harmonica.data.samples import SampleSpec, make_samples
from harmonica.evaluation.classifier import features_and_logits, load_classifier
from harmonica.evaluation.evaluation_report import (
    CACHED,
    FEWER,
    FULL,
    Estimate,
    EvaluationReport,
    VariantResult,
)
from harmonica.evaluation.image_metrics import label_accuracy, psnr
from harmonica.models.loading import ModelConfig, load_model
from harmonica.samplers import Ddim, SamplerConfig
from pipelines.config.workflow import TrainConfig
from pipelines.evaluation.latency import steps_as_long
from pipelines.evaluation.stage import advice, worth_having
from pipelines.presets import fashion
from pipelines.report.terminal import results_table
from pipelines.tracking.mlflow_runs import numbers


def result(steps: int, **metrics: float) -> VariantResult:
    return VariantResult(steps, metrics={key: Estimate(value) for key, value in metrics.items()})


def variants(cached_psnr: float, cached_frechet: float) -> dict[str, VariantResult]:
    return {
        FULL: result(20),
        CACHED: result(20, psnr_to_full=cached_psnr, frechet_to_full=cached_frechet),
        FEWER: result(12, psnr_to_full=35.0, frechet_to_full=0.05),
    }


@pytest.mark.parametrize(
    ("cached", "worth", "words"),
    [
        ((40.0, 0.01), True, "Worth having"),
        ((30.0, 0.01), False, "sampling in 12 steps at the same measured time is nearer .* by PSNR"),
        ((40.0, 0.09), False, "nearer .* by Frechet distance"),
    ],
)
def test_the_verdict_says_in_words_who_is_nearer(cached, worth, words) -> None:
    is_worth, verdict = worth_having(variants(*cached), TrainConfig())
    assert is_worth is worth
    assert re.search(words, verdict)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"target_speedup": 1.8}, "ask for less speed (train.target_speedup, which is 1.8)"),
        ({"target_cur": 0.4}, "reuse less (train.target_cur, which is 0.4)"),
        ({"target_psnr": 40.0}, "ask for nearer images (train.target_psnr, which is 40)"),
    ],
)
def test_the_advice_names_the_target_that_the_training_has(target, words) -> None:
    preset = fashion().train
    trained = preset.for_target(**target)
    assert words in advice(trained)
    (name,) = target
    assert dataclasses.replace(trained, **{name: 0.9 * target[name]}), "it can be followed"
    assert "train.sdt.beta, which is 0.007" in advice(TrainConfig())


def test_the_table_has_half_of_each_interval_and_the_noise_floor_beneath(capsys) -> None:
    report = {"cur": 0.4, "ideal_speedup": 1.6, "measured_speedup": 1.5, "realised_share": 0.9, "samples": 16}
    cached = {"psnr_to_full": 40.0, "psnr_to_full_interval": [39.5, 40.7], "frechet_to_full": 0.25}
    floor = {"frechet_to_full": 0.5, "frechet_to_full_interval": [0.25, 0.75], "kid_to_full": 0.1}
    report |= {"arms": {FULL: {"label_accuracy": 0.9}, CACHED: cached}, "noise_floor": floor}
    results_table(EvaluationReport.from_json(report))
    lines = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert ["variant", "PSNR to full, dB", "Frechet to full", "label accuracy"] in lines
    assert ["cached", "40.00 ±0.60", "0.2500", ""] in lines
    assert ["full, other noise", "", "0.5000 ±0.2500", ""] in lines


def test_an_interval_is_two_metrics_of_mlflow() -> None:
    report = {"arms": {"full": {"x": 1.0, "x_interval": [0.5, 1.5]}}, "verdict": "words"}
    expected = {"arms.full.x": 1.0, "arms.full.x_interval.low": 0.5, "arms.full.x_interval.high": 1.5}
    assert numbers(report) == expected


@pytest.mark.parametrize(
    ("cached", "steps"), [(0.5, 10), (0.501, 10), (0.52, 11), (0.677, 14), (1.3, 20), (0.01, 2)]
)
def test_fewer_steps_take_no_less_time_than_cached(cached, steps) -> None:
    assert steps_as_long(20, {FULL: 1.0, CACHED: cached}) == steps


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    rows = make_samples(np.arange(20), SampleSpec(seed=11, num_classes=10, shape=(1, 28, 28)))
    return torch.from_numpy(rows["noise"]), torch.from_numpy(rows["label"])


def test_the_built_in_champion_beats_fewer_steps_of_the_same_arithmetic(rows) -> None:
    model, champion = load_model(ModelConfig()).model, RouterArtifact.load(CHAMPION)
    champion.check(model, SamplerConfig())
    assert champion.plan.cur >= 0.3
    full = sample(Ddim(model, champion.sampler), *rows)
    cached = sample(Ddim(model, champion.sampler), *rows, champion.plan, reuse=champion.reuse)
    steps = -(-champion.sampler.num_inference_steps // champion.ideal_speedup)
    fewer = sample(Ddim(model, SamplerConfig(num_inference_steps=int(steps))), *rows)
    assert psnr(cached, full).mean() > psnr(fewer, full).mean() + 2
    _, logits = features_and_logits(load_classifier(), cached)
    assert label_accuracy(logits, rows[1]) >= 0.8
