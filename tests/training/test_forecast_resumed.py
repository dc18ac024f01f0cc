"""A fit of forecasts that is gone on from: the same bits, with the form that it was begun with."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from forecast_fits import FIT, STEPS, alternating
from latent_rows import rows

from harmonica.core.router import Router
from harmonica.core.segments import with_segments
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.training.config import TrainingConfig
from harmonica.training.plans.fitted_weights import LEAST_STEPS, linear_weights
from harmonica.training.plans.forecast_fit import ForecastFit
from harmonica.training.sampler_backend import SamplerBackend
from harmonica.training.sdt_config import SdtConfig
from harmonica.training.trainer import RouterTrainer


@pytest.mark.parametrize("segments", [False, True])
def test_a_run_resumes_bit_for_bit_within_its_forecasts(tiny_dit, segments):
    sampler = make_sampler(tiny_dit, SamplerConfig(num_inference_steps=STEPS, guidance_scale=1.5))
    config = TrainingConfig(
        trajectories=2,
        batch_size=4,
        initial="alternate",
        initial_logit=1.0,
        iepo="none",
        sdt=SdtConfig(reuse="forecast", threshold=0.5),
        forecast=replace(FIT, segments=segments),
    )

    def go_on(run: RouterTrainer) -> Iterator[int]:
        while run.trajectory < config.all_trajectories:
            run.train_one(rows(4 * run.trajectory))
            yield run.trajectory

    whole = RouterTrainer(sampler, config, seed=0)
    states = {k: copy.deepcopy(whole.state()) for k in go_on(whole)}
    for stop in (1, 2, 5, 6, 10):
        resumed = RouterTrainer(sampler, config, seed=0)
        resumed.load_state(states[stop])
        assert list(go_on(resumed)) == list(range(stop + 1, config.all_trajectories + 1))
        weights, correction_TJ = resumed.artifact().forecast_TBK, resumed.artifact().correction_TJ
        assert torch.equal(weights, whole.artifact().forecast_TBK), stop
        assert torch.equal(correction_TJ, whole.artifact().correction_TJ) and correction_TJ.any(), stop
    plan = whole.artifact().plan
    assert resumed.artifact().segments == plan.segments == ((0,) if segments else None)
    assert not torch.equal(weights.double(), linear_weights(replace(plan, segments=None), 2))
    if segments:
        assert torch.equal(weights, weights[:, :1].expand_as(weights)), "one weight for all branches"


def test_a_fit_that_was_begun_without_segments_ends_without_them(sampler):
    fit = ForecastFit(alternating(), FIT)
    for k in range(5):
        fit.observe(SamplerBackend(sampler), [rows(4 * k)], lambda sums: None)
    state = {name: value for name, value in fit.state().items() if name != "segments"}
    other = ForecastFit(with_segments(alternating(), sampler.model), FIT)
    other.load_state(state)
    for each in (fit, other):
        for k in range(5, 8):
            each.observe(SamplerBackend(sampler), [rows(4 * k)], lambda sums: None)
    assert other.planned() == fit.planned() and other.planned().segments is None


def test_a_fit_that_was_begun_without_a_correction_ends_without_one(sampler):
    fit = ForecastFit(alternating(), replace(FIT, corrections=0))
    for k in range(5):
        fit.observe(SamplerBackend(sampler), [rows(4 * k)], lambda sums: None)
    state = fit.state()
    assert "correction" not in state
    other = ForecastFit(alternating(), FIT)
    other.load_state(state)
    for each in (fit, other):
        for k in range(5, 8):
            each.observe(SamplerBackend(sampler), [rows(4 * k)], lambda sums: None)
    assert other.planned() == fit.planned() and other.planned().correction is None


def test_a_fit_that_was_begun_with_fewer_differences_goes_on_with_them(sampler):
    # As by versions in which a fit began without a correction, and had one difference.
    plan = Router.alternating(LEAST_STEPS, 6, 1.0).plan(0.5)
    many = make_sampler(sampler.model, replace(sampler.config, num_inference_steps=LEAST_STEPS))
    state = {
        "weights": linear_weights(plan, FIT.order),
        "segments": None,
        "correction": torch.full((LEAST_STEPS, 1), 0.1, dtype=torch.float64),
        "folds": [],
        "trial": None,
        "trajectories": 0,
    }
    fit = ForecastFit(plan, FIT)
    assert fit.planned().corrections == 2, "every second step is reused"
    fit.load_state(state)
    for k in range(8):
        fit.observe(SamplerBackend(many), [rows(4 * k)], lambda sums: None)
    assert fit.planned().corrections == 1
