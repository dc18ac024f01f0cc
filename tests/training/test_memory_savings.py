"""The measured start and the fit with less memory of the device: the same numbers."""

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from all_phases import ALL_PHASES
from tiny_recorded_pipelines import make_case

from harmonica.core.plan import Plan, correction_of, forecast_of
from harmonica.core.plan_builders import stepwise_plan
from harmonica.core.sampling import sample
from harmonica.core.segments import with_segments
from harmonica.data.batch import Batch
from harmonica.models.base import freeze
from harmonica.models.dit.model import DiT, DiTConfig
from harmonica.samplers import Sampler, SamplerConfig, make_sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.backend import Sketch, TrajectoryBackend
from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.plans.fitted_weights import linear_weights
from harmonica.training.plans.forecast_sketch import sketch_image_error
from harmonica.training.plans.step_sketch import sketch_steps
from harmonica.training.sampler_backend import SamplerBackend
from harmonica.training.trainer import RouterTrainer
from tests.benchmarks.live_tensors import SAVINGS, peak_of, peaks_in_both
from tests.integrations.test_pipeline_training import all_phases_trainer

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


def check_peaks(peaks: dict[str, tuple[int, int]]) -> None:
    device = {name: device for name, (device, _) in peaks.items()}
    assert device["recomputed"] < device["none"] / 2
    assert device["offloaded"] < device["none"] / 2
    assert device["both"] < device["none"] / 4
    assert [on_host > 0 for _, on_host in peaks.values()] == [False, False, True, True]


def same(one: Sketch, other: Sketch) -> None:
    for name in ("error_N", "residual_R", "jacobian_RP"):
        assert getattr(one, name).abs().max() > 0
        torch.testing.assert_close(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("segments", [False, True])
def test_the_fit_measures_the_same_in_less_memory(sampler, segments):
    # A part of step 3 too, so that a run of branches ends within a step.
    rows = [list(row) for row in stepwise_plan(STEPS, 12, [1, 2, 5]).compute]
    rows[3][4:7] = [False] * 3
    plan, batch = with_weights(Plan(tuple(map(tuple, rows)))), batch_of(sampler)
    if segments:
        plan = with_segments(plan, sampler.model)
        assert plan.segments == (0, 4, 7)
    full = sample(sampler, batch.noise_NCHW, batch.condition_N).clone()
    seen: dict[str, Sketch] = {}

    def measure(name: str) -> None:
        how = {"order": 2, "probes": 2, "savings": SAVINGS[name]}
        seen[name] = sketch_image_error(sampler, plan, batch, full, **how)

    check_peaks({name: peaks_in_both(sampler.model, partial(measure, name)) for name in SAVINGS})
    for name in SAVINGS:
        same(seen[name], seen["none"])


@pytest.mark.parametrize("segments", [False, True])
def test_the_start_measures_the_same_in_less_memory(sampler, segments):
    batch, seen = batch_of(sampler), dict[str, Any]()

    def measure(name: str) -> None:
        how = {"reach": 7, "corrections": 1, "probes": 2, "savings": SAVINGS[name], "segments": segments}
        seen[name] = sketch_steps(sampler, batch, **how)

    check_peaks({name: peaks_in_both(sampler.model, partial(measure, name)) for name in SAVINGS})
    assert seen["none"].abs().max() > 0
    for name in SAVINGS:
        torch.testing.assert_close(seen[name], seen["none"])


def test_a_weight_keeps_no_difference_of_its_own(sampler):
    """Of a reused step, nothing as large as a branch's value stays for the backward."""
    batch = batch_of(sampler)
    full = sample(sampler, batch.noise_NCHW, batch.condition_N).clone()

    def peak(steps: list[int]) -> int:
        plan = with_weights(stepwise_plan(STEPS, 12, steps))
        how = {"order": 2, "probes": 1, "savings": SAVINGS["recomputed"]}
        return peak_of(sampler.model, lambda: sketch_image_error(sampler, plan, batch, full, **how))

    computed_more, reused_more = peak([3]), peak([0, 1, 2, 3])
    assert reused_more < computed_more


@pytest.mark.parametrize("kind", ["flux", "sd3", "wan 2.2", "z-image truncated"])
def test_a_pipeline_measures_the_same(kind):
    case = make_case(kind)
    with all_phases_trainer(case) as trainer:
        backend, batch = trainer.backend, trainer._batch(0)
        assert isinstance(backend, TrajectoryBackend)
        full = backend.images(batch).clone()
        branches = len(backend.sampler.model.branches)
        plan = with_weights(stepwise_plan(6, branches, [s for s in (1, 3) if s not in backend.fixed_steps]))
        fits, starts = dict[str, Sketch](), dict[str, torch.Tensor]()

        def measure(name: str) -> None:
            how = {"probes": 1, "savings": SAVINGS[name]}
            fits[name] = backend.sketch(plan, batch, full, order=2, **how)
            starts[name] = backend.step_sketch(batch, reach=3, corrections=1, **how)

        for name in ("none", "both"):
            _, on_host = peaks_in_both(case.pipe.transformer, partial(measure, name))
            assert (on_host > 0) == SAVINGS[name].offload
        same(fits["both"], fits["none"])
        torch.testing.assert_close(starts["both"], starts["none"])


@pytest.mark.parametrize("phase", ["step_sketch", "sketch"])
def test_an_error_of_too_little_memory_says_what_helps(sampler, phase, monkeypatch):
    def too_much(self: Any, *of: Any, **how: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(SamplerBackend, phase, too_much)
    forecast = dataclasses.replace(ALL_PHASES.forecast, rows_at_once=1, activation_checkpointing=True)
    config, batch = dataclasses.replace(ALL_PHASES, forecast=forecast), batch_of(sampler)
    run = RouterTrainer(sampler, config, seed=0)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory") as caught:
        while run.trajectory < config.all_trajectories:
            run.train_one(batch)
    assert caught.value.__notes__ == [
        "The gradients of a whole trajectory do not fit: give train.forecast.segments True, or "
        "train.forecast.activation_offloading True."
    ]
    assert ForecastConfig().cures[0] == "train.forecast.rows_at_once 1"
    assert not dataclasses.replace(forecast, activation_offloading=True).cures
