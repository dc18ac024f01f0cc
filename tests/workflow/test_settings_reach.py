"""What a model and its steps can be trained for: targets within reach, and those that are refused."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given, reject
from hypothesis import settings as examples
from hypothesis import strategies as st

from harmonica.core.plan_builders import even_plan, fastest_speedup, slowest_speedup
from harmonica.data.batch import Batch
from harmonica.models.base import Macs, freeze
from harmonica.models.dit.model import DiT, DiTConfig
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.config import TrainingConfig
from harmonica.training.feasibility import check_training
from harmonica.training.multi_target import MultiTargetTrainer
from harmonica.training.plans.search import StepSearch
from pipelines.compare.methods import learned_methods
from pipelines.config.compare import CompareConfig
from pipelines.config.sweep import SweepConfig
from pipelines.preflight import check_comparison, check_trials
from pipelines.presets import PRESETS, fashion
from pipelines.sweep.trial import trials_of


def tiny(channels: int = 1) -> DiT:
    shape = DiTConfig(
        sample_size=16,
        patch_size=4,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        num_attention_heads=1,
        attention_head_dim=4,
        num_embeds_ada_norm=3,
    )
    model = DiT(shape)
    model.initialize(torch.Generator().manual_seed(0), zero=False)
    freeze(model)
    return model


MODEL = tiny()

MACS = st.builds(
    Macs,
    branches=st.lists(st.integers(1, 200), min_size=1, max_size=40).map(tuple),
    rest=st.integers(0, 500),
)


@examples(derandomize=True, max_examples=100)
@given(macs=MACS, num_steps=st.integers(2, 120))
def test_every_speed_between_the_slowest_and_the_fastest_reuses_something(macs: Macs, num_steps: int) -> None:
    slowest, fastest = slowest_speedup(num_steps, macs), fastest_speedup(num_steps, macs)
    if slowest >= fastest:
        reject()
    # A half is not rounded up.
    for part in (1e-6, 0.01, 0.3, 0.7, 1):
        assert even_plan(num_steps, macs, slowest + part * (fastest - slowest)).cur > 0
    if slowest - 1 > 1e-6:
        assert even_plan(num_steps, macs, 1 + 0.99 * (slowest - 1)).cur == 0


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (
            {"target_speedup": 1.004},
            r"train.target_speedup is 1.004: 6 steps .* reuse nothing .* give 1.\d+ or",
        ),
        (
            {"target_speedup": 30.0},
            r"train.target_speedup is 30.0: 6 steps of this model .* reach [\d.]+ at most",
        ),
        ({"target_speedup": 1.5, "targets": (1.4, 99.0)}, r"train.targets is 99.0: 6 steps .* at most"),
        ({"target_cur": 0.9}, r"train.target_cur is 0.9: give 0.\d+ to 0.833"),
        ({"target_cur": 0.001}, r"train.target_cur is 0.001: give 0.\d+ to 0.833"),
    ],
)
@pytest.mark.parametrize("start", [{}, {"initial": "measured", "start_trajectories": 1}])
def test_targets_out_of_reach_are_refused_with_the_nearest_that_works(train, start, words) -> None:
    config = TrainingConfig(**train, **start)
    with pytest.raises(ValueError, match=words) as caught:
        check_training(config, MODEL, 6)
    name = "targets" if "targets" in train else next(iter(train))
    cures = [float(number) for number in re.findall(r"\d+\.\d+", str(caught.value).split(": ", 1)[1])]
    for cure in cures:
        check_training(
            dataclasses.replace(config, **{name: (cure,) if name == "targets" else cure}), MODEL, 6
        )


def test_a_quality_in_decibels_is_for_models_that_draw_pixels() -> None:
    config = TrainingConfig(target_psnr=40.0, initial="measured", start_trajectories=1)
    check_training(config, MODEL, 6)
    with pytest.raises(
        ValueError, match=r"train.target_psnr is 40.0: the model draws latents, and .* give 0"
    ):
        check_training(config, tiny(channels=4), 6)


def test_a_search_over_silent_branches_ends() -> None:
    assert len(StepSearch(20, 2).best(8)) == 8


@pytest.mark.parametrize("name", ["fashion", "dit-xl-2-256-t20"])
@pytest.mark.parametrize("target", [{"target_cur": 0.2}, {"target_speedup": 1.2}])
def test_any_preset_can_be_swept_over_either_target(name: str, target: dict[str, float]) -> None:
    ((over, value),) = target.items()
    config = dataclasses.replace(PRESETS[name](), sweep=SweepConfig(over=over))
    check_trials(config, MODEL)
    trial = trials_of(config)[0]
    assert trial.target == value
    train = trial.settings(config).train
    assert [getattr(train, each) for each in ("target_cur", "target_speedup", "target_psnr")] == [
        target.get("target_cur", 0.0),
        target.get("target_speedup", 0.0),
        0.0,
    ]
    assert train.initial == config.train.initial


def test_a_start_for_a_share_of_reuse_has_that_share() -> None:
    sampler = make_sampler(MODEL, SamplerConfig(num_inference_steps=12))
    settings = fashion().train.for_target(target_cur=0.4)
    settings = dataclasses.replace(
        settings, start_trajectories=1, trajectories=1, batch_size=2, num_workers=1
    )
    run = MultiTargetTrainer(sampler, settings, seed=0)
    while run.trajectory < 1 + 1 + settings.choice_trajectories:
        train_one(run)
    starts = {
        name: run.current.context.target.plan_of(logits)
        for name, logits in run.current.context.starts.items()
    }
    assert starts.keys() >= {"even", "measured"}
    for plan in (*starts.values(), run.plan):
        assert abs(plan.cur - 0.4) <= 1 / 12, "to a step"


def test_a_target_of_quality_gives_way_to_the_speeds_of_a_comparison() -> None:
    quality = fashion().train.for_target(target_psnr=40.0)
    config = dataclasses.replace(fashion(), train=quality, compare=CompareConfig(targets=(1.3,)))
    check_comparison(config, MODEL)
    assert {train.target_psnr for train in learned_methods(quality, 1.3, with_baselines=True).values()} == {
        0.0
    }


@pytest.mark.parametrize(
    ("compare", "steps", "words"),
    [
        ((1.4, 9.9), 6, r"compare.targets is 9.9: 6 steps of this model .* reach [\d.]+ at most"),
        ((1.3, 2.01), 3, "compare.targets is 2.01: give at most 2, since the baseline of fewer steps"),
    ],
)
def test_a_comparison_at_speeds_out_of_reach_is_refused(compare, steps, words) -> None:
    sampler = SamplerConfig(num_inference_steps=steps)
    config = dataclasses.replace(fashion(), sampler=sampler, compare=CompareConfig(targets=compare))
    with pytest.raises(ValueError, match=words):
        check_comparison(config, MODEL)


def train_one(run: MultiTargetTrainer) -> None:
    keys = SampleKeys.of(0, range(run.config.batch_size))
    noise = torch.from_numpy(keys.start_noise((1, 16, 16)))
    run.train_one(Batch(noise, torch.arange(run.config.batch_size) % 3, keys))
