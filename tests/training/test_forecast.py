"""Learned forecasts: their derivatives against differences, their fit against images it has not seen."""

from dataclasses import replace

import pytest
import torch
from forecast_fits import FIT, STEPS, alternating
from latent_rows import rows
from tolerances import CLOSE
from torch import Tensor

from harmonica.core.plan import Plan, forecast_of
from harmonica.core.plan_builders import stepwise_plan, with_fixed_correction
from harmonica.core.sampling import sample
from harmonica.core.segments import with_segments
from harmonica.data.batch import Batch
from harmonica.models.loading import load_model
from harmonica.samplers import Sampler, make_sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.plans.fitted_weights import (
    LEAST_STEPS,
    OUTPUT,
    FittedWeights,
    linear_weights,
    unknowns,
)
from harmonica.training.plans.forecast_fit import ForecastFit
from harmonica.training.plans.forecast_sketch import probes_of, sketch_image_error
from harmonica.training.presets import fashion
from harmonica.training.sampler_backend import SamplerBackend
from tests.benchmarks import ideas


def planned_images(sampler: Sampler, plan: Plan, batch: Batch) -> Tensor:
    return sample(sampler, batch.noise_NCHW, batch.condition_N, plan, reuse="forecast").clone()


def error(sampler: Sampler, plan: Plan, first: int, count: int) -> float:
    batch = rows(first, count)
    full_NCHW = sample(sampler, batch.noise_NCHW, batch.condition_N)
    return (planned_images(sampler, plan, batch) - full_NCHW).square().mean().item()


def test_linear_weights_are_the_linear_forecast(sampler):
    plan, inputs = alternating(), (rows(0).noise_NCHW, rows(0).condition_N)
    weighted = Plan(plan.compute, forecast_of(linear_weights(plan, 2)))
    linear, same = (sample(sampler, *inputs, p, reuse="forecast") for p in (plan, weighted))
    torch.testing.assert_close(linear, same, **CLOSE)
    held = sample(sampler, *inputs, weighted, reuse="hold")
    assert torch.equal(held, sample(sampler, *inputs, plan, reuse="hold")), "to hold asks for no weights"


@pytest.mark.parametrize("segments", [False, True])
def test_derivatives_are_those_of_moved_weights(sampler, segments):
    plan, batch, small = alternating(), rows(0, 2), 1e-5
    if segments:
        plan = with_segments(plan, sampler.model)
        assert plan.segments == (0,), "whole steps"
    weights = FittedWeights(linear_weights(plan, 2), torch.full((STEPS, 2), 0.1, dtype=torch.float64))
    names, full_NCHW = unknowns(plan, 2, 2), sample(sampler, batch.noise_NCHW, batch.condition_N).clone()
    seen = sketch_image_error(sampler, weights.of(plan), batch, full_NCHW, order=2, probes=2)
    assert seen.jacobian_RP.shape == (4, len(names))
    corrections = [(i, OUTPUT, k) for i in range(7, -1, -1) for k in range(2) if i + k < STEPS - 1]
    assert names[-len(corrections) :] == corrections
    assert len(names) - len(corrections) == sum(
        min(2, sum(column[i + 1 :]) - 1) * (not column[i])
        for column in zip(*plan.by_segment().compute, strict=True)
        for i in range(STEPS)
    )
    change_NCHW = planned_images(sampler, weights.of(plan), batch) - full_NCHW
    probes = list(probes_of(change_NCHW, batch.keys, STEPS, 2))
    towards_NP = (seen.jacobian_RP * seen.residual_R[:, None]).unflatten(0, (2, -1)).mean(0)
    for column in (0, (len(names) - len(corrections)) // 2, len(names) - len(corrections), len(names) - 1):
        above, below = (
            planned_images(sampler, weights.moved([(names[column], by)]).of(plan), batch)
            for by in (small, -small)
        )
        slope_NCHW = (above - below) / (2 * small)
        slope_R = torch.cat([(slope_NCHW * probe).flatten(1).sum(1) for probe in probes])
        assert slope_R.abs().max() > 1e-9
        torch.testing.assert_close(seen.jacobian_RP[:, column].double(), slope_R, rtol=1e-3, atol=1e-8)
        # Of each image's error the gradient is exact, whatever is drawn.
        half_N = (change_NCHW * slope_NCHW).flatten(1).mean(1)
        torch.testing.assert_close(towards_NP[:, column].double(), half_N, rtol=1e-3, atol=1e-8)


def test_the_mean_of_probes_is_as_that_of_random_ones():
    keys, change_X = SampleKeys.of(3, range(20_000)), torch.tensor([3.0, -4.0, 12.0])
    change_NX = change_X.expand(20_000, 3).clone()
    change_NX[::2] = 0.0  # nothing has changed in every second image
    probes = list(probes_of(change_NX, keys, STEPS, 3))
    for each in (0, 1):
        products = [torch.einsum("nx,ny->nxy", probe[each::2], probe[each::2]) for probe in probes]
        seen_XX = torch.stack(products).flatten(0, 1)
        spread_XX = seen_XX.std(0) / len(seen_XX) ** 0.5
        assert ((seen_XX.mean(0) - torch.eye(3) / 3).abs() < 5 * spread_XX + 1e-6).all()
    along_NX, *others = (probe[1::2] for probe in probes)
    torch.testing.assert_close(along_NX, (change_X / 13).expand_as(along_NX), **CLOSE)
    for probe in others:
        assert (probe @ change_X).abs().max() < 1e-4
    (alone_NX,) = probes_of(change_NX, keys, STEPS, 1)
    assert torch.equal(alone_NX, torch.from_numpy(keys.step_noise(STEPS, (3,))).float() / 3**0.5)


@pytest.mark.parametrize("segments", [False, True])
def test_a_fit_holds_for_images_it_has_not_seen(sampler, segments):
    plan = with_segments(alternating(), sampler.model) if segments else alternating()
    fit = ForecastFit(plan, replace(FIT, trajectories=16, probes=4))
    before = error(sampler, fit.planned(), 100, 16)
    for k in range(16):
        metrics = fit.observe(SamplerBackend(sampler), [rows(4 * k)], lambda sums: None)
        assert ("forecast.ridge" in metrics) == (k in (7, 15)), "a round ends after half of the trajectories"
    assert error(sampler, fit.planned(), 100, 16) < 0.8 * before


def test_rows_at_once_change_nothing(sampler):
    fits = []
    for size in (1, 4):
        fit = ForecastFit(alternating(), FIT)
        for k in range(4):
            fit.observe(SamplerBackend(sampler), rows(4 * k).split(size), lambda sums: None)
        fits.append(fit.weights.forecast_TUK)
    torch.testing.assert_close(*fits, rtol=1e-5, atol=1e-6)


def test_a_correction_of_the_built_in_model_brings_its_images_nearer():
    recipe = fashion()
    model = load_model(recipe.model).model
    sampler = make_sampler(model, replace(recipe.sampler, num_inference_steps=6))
    backend, plan, errors = SamplerBackend(sampler), stepwise_plan(6, len(model.branches), [3]), []
    for corrections in (1, 0):
        fit = ForecastFit(plan, ForecastConfig(trajectories=4, rounds=1, probes=2, corrections=corrections))
        for k in range(4):
            fit.observe(backend, [ideas.rows(sampler, 0, 4 * k, 4)], lambda sums: None)
        assert (fit.planned().correction is None) == (corrections == 0)
        batch = ideas.rows(sampler, 0, 1000, 8)
        change_NCHW = backend.images(batch, fit.planned(), "forecast") - backend.images(batch)
        errors.append(float(change_NCHW.square().mean((1, 2, 3)).log10().mean()))
    assert errors[0] < errors[1] - 0.1, "1 dB; it is about 3"


def test_steps_after_the_first_that_is_reused_are_corrected():
    # Step T-2 has one value before it, and so no difference to weigh.
    plan = stepwise_plan(STEPS, 6, [STEPS - 2])
    assert unknowns(plan, 2, 1) == [(i, OUTPUT, 0) for i in reversed(range(STEPS - 1))]
    assert unknowns(stepwise_plan(STEPS, 6, [0]), 2, 1)[-1:] == [(0, OUTPUT, 0)]
    assert unknowns(Plan.full(STEPS, 6), 2, 1) == []


def test_a_fit_begins_at_the_fixed_correction():
    plan = stepwise_plan(LEAST_STEPS, 6, [1, 2, 5])
    fixed = with_fixed_correction(plan).correction
    assert fixed is not None and len(fixed[0]) == 3, "two steps run"
    for corrections, zeros in ((1, ()), (5, (0.0, 0.0))):
        begun = ForecastFit(plan, ForecastConfig(trajectories=4, corrections=corrections)).planned()
        assert begun.correction == tuple((*row, *zeros) for row in fixed)
    assert ForecastFit(plan, ForecastConfig(trajectories=4, corrections=0)).planned().correction is None
    for few in (Plan.full(LEAST_STEPS, 6), stepwise_plan(LEAST_STEPS - 1, 6, [1, 2, 5])):
        begun = ForecastFit(few, ForecastConfig(trajectories=4)).planned()
        assert begun.correction == ((0.0,),) * few.num_steps
