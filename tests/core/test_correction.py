"""A plan's correction of the model's output, against the formula written out."""

from dataclasses import replace

import pytest
import torch
from latent_rows import rows
from tolerances import CLOSE
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.cache import BranchCache
from harmonica.core.passes import planned_pass
from harmonica.core.plan import Plan, correction_of, forecast_of
from harmonica.core.plan_builders import even_plan, stepwise_plan, with_fixed_correction
from harmonica.core.router import Router
from harmonica.core.sampling import sample
from harmonica.io.tensor_files import write_tensors
from harmonica.models.base import Macs
from harmonica.models.dit.model import DiT
from harmonica.samplers import Sampler, SamplerConfig, make_sampler
from harmonica.training.plans.fitted_weights import linear_weights

STEPS, BRANCHES, CHANNELS = 6, 6, 4


@pytest.fixture(params=[1.0, 1.5])
def sampler(tiny_dit: DiT, request) -> Sampler:
    config = SamplerConfig(num_inference_steps=STEPS, guidance_scale=request.param, clip_sample=False)
    return make_sampler(tiny_dit, config)


def corrected_plan(differences: int, *, scale: float = 0.3) -> Plan:
    plan = stepwise_plan(STEPS, BRANCHES, [1, 3])
    weights_TJ = scale * torch.randn(STEPS, differences, generator=torch.Generator().manual_seed(0)).double()
    return Plan(plan.compute, forecast_of(linear_weights(plan, 2)), correction_of(weights_TJ))


@torch.no_grad()
def written_out(sampler: Sampler, plan: Plan) -> Tensor:
    """The images, each output corrected by hand and then guided."""
    assert plan.correction is not None
    batch, cache, outputs = rows(0, 3), BranchCache(BRANCHES, "forecast", plan.forecast), dict[int, Tensor]()
    state = batch.start(sampler)
    for i in reversed(range(STEPS)):
        hidden, conditioning = sampler.embed(i, state)
        output = outputs[i] = planned_pass(sampler.model, hidden, conditioning, plan.compute[i], cache, i)
        corrected = output.clone()
        for k, weight in enumerate(plan.correction[i]):
            if i + k + 1 < STEPS:
                difference = (outputs[i + k] - outputs[i + k + 1])[:, :CHANNELS]
                corrected[:, :CHANNELS] += weight * difference
        state = sampler.advance(i, state, sampler.guide(corrected))
    return sampler.finish(state)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("differences", [1, 2])
def test_the_noise_is_corrected_at_every_step_and_the_variance_is_not(sampler, differences, accumulate):
    plan, batch = corrected_plan(differences), rows(0, 3)
    assert sampler.model.out_channels > CHANNELS, "it has learned variances"
    inputs = (batch.noise_NCHW, batch.condition_N)
    drawn = sample(sampler, *inputs, plan, reuse="forecast", accumulate=accumulate)
    torch.testing.assert_close(drawn, written_out(sampler, plan), **CLOSE)
    plain = sample(sampler, *inputs, replace(plan, correction=None), reuse="forecast", accumulate=accumulate)
    assert not torch.allclose(drawn, plain, rtol=1e-3)
    zero = replace(plan, correction=((0.0,) * differences,) * STEPS)
    assert torch.equal(sample(sampler, *inputs, zero, reuse="forecast", accumulate=accumulate), plain)


@pytest.mark.parametrize("accumulate", [False, True])
def test_values_that_are_held_are_not_corrected(sampler, accumulate):
    plan, batch = corrected_plan(1), rows(0, 3)
    held = [
        sample(sampler, batch.noise_NCHW, batch.condition_N, each, accumulate=accumulate)
        for each in (plan, Plan(plan.compute))
    ]
    assert torch.equal(*held)


def test_recorded_steps_correct_too(sampler, no_codegen, host_recorder):
    plan, batch = corrected_plan(1), rows(0, 3)
    sampler.model.execution = "graphed"
    for _ in range(2):
        drawn = sample(sampler, batch.noise_NCHW, batch.condition_N, plan, reuse="forecast")
    assert len(sampler.model.graphs) == 1
    sampler.model.execution = "eager"
    torch.testing.assert_close(drawn, written_out(sampler, plan), **CLOSE)


def test_a_copy_of_a_cache_has_the_outputs_of_its_own(sampler):
    cache, batch = BranchCache(BRANCHES, "forecast", None, corrected_plan(1).correction), rows(0, 3)
    hidden, conditioning = sampler.embed(STEPS - 1, batch.start(sampler))
    planned_pass(sampler.model, hidden, conditioning, (True,) * BRANCHES, cache, STEPS - 1)
    twin = cache.copy()
    planned_pass(sampler.model, 2 * hidden, conditioning, (True,) * BRANCHES, twin, STEPS - 2)
    assert len(cache.outputs._kept[0]) == 1 and len(twin.outputs._kept[0]) == 2


def test_an_artifact_keeps_it_and_an_older_reader_refuses_it(sampler, tmp_path):
    logits, plan = Router.alternating(STEPS, BRANCHES, 1.0).logits(), corrected_plan(1)
    made = RouterArtifact.build(
        logits,
        sampler,
        threshold=0.5,
        reuse="forecast",
        training={},
        forecast_TBK=torch.tensor(plan.forecast),
        correction_TJ=torch.tensor(plan.correction),
    )
    read = RouterArtifact.load(made.save(tmp_path))
    assert read.plan == made.plan and read.plan.correction is not None
    assert '"format_version": 3' in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("rows_TJ", [((0.1,),) * 5, ((0.1,),) * 5 + ((0.1, 0.2),)])
def test_another_shape_is_refused(rows_TJ):
    with pytest.raises(ValueError, match="give T rows of as many weights"):
        Plan(stepwise_plan(STEPS, BRANCHES, [1]).compute, None, rows_TJ)


def test_a_file_with_another_shape_is_refused(sampler, tmp_path):
    logits = Router.alternating(STEPS, BRANCHES, 1.0).logits()
    settings = {"threshold": 0.5, "reuse": "forecast", "training": {}}
    artifact = RouterArtifact.build(logits, sampler, **settings, correction_TJ=torch.zeros(STEPS, 1))
    for shape, words in (((STEPS,), "give a T x J table"), ((STEPS + 1, 1), "give T rows of as many")):
        folder = artifact.save(tmp_path)
        write_tensors({"logits": logits, "correction": torch.zeros(shape)}, folder / "router.safetensors")
        with pytest.raises(ValueError, match=words):
            RouterArtifact.load(folder)


def test_a_stretched_plan_has_none():
    assert corrected_plan(1).at_steps(9).correction is None


@pytest.mark.parametrize("share", [0.5, 0.75])
@pytest.mark.parametrize("reused", [[1], [1, 3], [1, 2, 4], [0, 1, 2, 3]])
def test_without_training_a_computed_step_makes_up_for_what_reused_ones_lack_to_the_line(reused, share):
    plan = with_fixed_correction(stepwise_plan(STEPS, BRANCHES, reused), share)
    outputs = torch.randn(STEPS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in range(STEPS):
        run = 0
        while i not in reused and i + run + 1 in reused:
            run += 1
        ends = outputs[i], outputs[min(i + run + 1, STEPS - 1)]
        lacking = sum(torch.lerp(*ends, k / (run + 1)) - outputs[i + k] for k in range(1, run + 1))
        row = plan.correction[i] if plan.correction else ()
        given = sum(w * (outputs[i + j] - outputs[i + j + 1]) for j, w in enumerate(row) if i + j + 1 < STEPS)
        assert float(given) == pytest.approx(float(share * lacking), abs=1e-12), i


def test_without_training_a_plan_that_mends_nothing_has_no_correction():
    for plan in (Plan.full(STEPS, BRANCHES), stepwise_plan(STEPS, BRANCHES, [0, 1])):
        assert with_fixed_correction(plan).correction is None, "no computed step follows a reused one"
    part = Plan(tuple((i != 2, True) for i in range(STEPS)))
    assert with_fixed_correction(part).correction is None, "a step that is reused in part is computed"


def test_outputs_that_change_evenly_are_left_as_they_are():
    """A straight line of outputs has nothing to make up for, however long the runs."""
    plan = with_fixed_correction(even_plan(20, Macs((10,) * BRANCHES, 0), 3.0))
    assert plan.correction is not None
    assert all(abs(sum(row)) < 1e-12 for row in plan.correction)
