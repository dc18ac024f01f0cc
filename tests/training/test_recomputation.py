"""The measured start and the fit with branches computed again: the same numbers, in less memory."""

import dataclasses
from typing import Any

import pytest
import torch
from all_phases import ALL_PHASES
from tiny_recorded_pipelines import make_case

from harmonica.core.plan import Plan, correction_of, forecast_of
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.models.base import freeze
from harmonica.models.dit.model import DiT, DiTConfig
from harmonica.pipeline_training.trainer import PipelineTrainer
from harmonica.samplers import Sampler, SamplerConfig, make_sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.backend import Sketch, TrajectoryBackend
from harmonica.training.plans.builders import stepwise_plan
from harmonica.training.plans.forecast_sketch import linear_weights, sketch_image_error
from harmonica.training.plans.step_sketch import sketch_steps
from tests.benchmarks.live_tensors import peak_of
from tests.integrations.test_pipeline_training import prompts_of

STEPS = 8


def with_weights(plan: Plan) -> Plan:
    """Linear forecasts of two differences, and a correction."""
    correction = correction_of(torch.full((plan.num_steps, 1), 0.1, dtype=torch.float64))
    return Plan(plan.compute, forecast_of(linear_weights(plan, 2)), correction)


@pytest.fixture
def sampler() -> Sampler:
    """64 tokens of width 128, twelve branches."""
    model = DiT(DiTConfig(sample_size=16, num_layers=6, num_attention_heads=4, attention_head_dim=32))
    model.initialize(torch.Generator().manual_seed(0), zero=False)
    freeze(model)
    config = SamplerConfig(num_inference_steps=STEPS, guidance_scale=1.5, clip_sample=False)
    return make_sampler(model, config)


def batch_of(sampler: Sampler) -> Batch:
    keys = SampleKeys.of(0, range(2))
    return Batch(torch.from_numpy(keys.start_noise((4, 16, 16))), torch.arange(2), keys)


def same(one: Sketch, other: Sketch) -> None:
    for name in ("error_N", "residual_R", "jacobian_RP"):
        assert getattr(one, name).abs().max() > 0
        torch.testing.assert_close(getattr(one, name), getattr(other, name))


def test_the_fit_measures_the_same_in_less_memory(sampler):
    # A part of step 3 too, so that a run of branches ends within a step.
    rows = [list(row) for row in stepwise_plan(STEPS, 12, [1, 2, 5]).compute]
    rows[3][4:7] = [False] * 3
    plan, batch = with_weights(Plan(tuple(map(tuple, rows)))), batch_of(sampler)
    full = sample(sampler, batch.noise_NCHW, batch.condition_N).clone()
    seen: dict[bool, Sketch] = {}

    def measure(recompute: bool) -> None:
        seen[recompute] = sketch_image_error(
            sampler, plan, batch, full, order=2, probes=2, recompute=recompute
        )

    peaks = {each: peak_of(sampler.model, lambda each=each: measure(each)) for each in (False, True)}
    same(seen[True], seen[False])
    assert peaks[True] < peaks[False] / 2


def test_the_start_measures_the_same_in_less_memory(sampler):
    batch, seen = batch_of(sampler), dict[bool, Any]()

    def measure(recompute: bool) -> None:
        how = {"reach": 3, "corrections": 1, "probes": 2, "recompute": recompute}
        seen[recompute] = sketch_steps(sampler, batch, **how)

    peaks = {each: peak_of(sampler.model, lambda each=each: measure(each)) for each in (False, True)}
    assert seen[True].abs().max() > 0
    torch.testing.assert_close(seen[True], seen[False])
    assert peaks[True] < peaks[False] / 2


def test_a_weight_keeps_no_difference_of_its_own(sampler):
    """Of a reused step, nothing as large as a branch's value stays for the backward."""
    batch = batch_of(sampler)
    full = sample(sampler, batch.noise_NCHW, batch.condition_N).clone()

    def peak(steps: list[int]) -> int:
        plan = with_weights(stepwise_plan(STEPS, 12, steps))
        return peak_of(
            sampler.model,
            lambda: sketch_image_error(sampler, plan, batch, full, order=2, probes=1, recompute=True),
        )

    computed_more, reused_more = peak([3]), peak([0, 1, 2, 3])
    assert reused_more < computed_more


@pytest.mark.parametrize("kind", ["flux", "sd3", "wan 2.2", "z-image truncated"])
def test_a_pipeline_measures_the_same(kind):
    case = make_case(kind)
    prompts, call = prompts_of(case)
    call["num_inference_steps"] = 6
    config = dataclasses.replace(ALL_PHASES, target_speedup=0.0, target_cur=1 / 3)
    with PipelineTrainer(case.pipe, prompts, config, call=call) as trainer:
        backend, batch = trainer.backend, trainer._batch(0)
        assert isinstance(backend, TrajectoryBackend)
        full = backend.images(batch).clone()
        branches = len(backend.sampler.model.branches)
        plan = with_weights(stepwise_plan(6, branches, [s for s in (1, 3) if s not in backend.fixed_steps]))
        one, other = (
            backend.sketch(plan, batch, full, order=2, probes=1, recompute=each) for each in (False, True)
        )
        same(one, other)
        start, again = (
            backend.step_sketch(batch, reach=3, corrections=1, probes=1, recompute=each)
            for each in (False, True)
        )
        torch.testing.assert_close(start, again)
