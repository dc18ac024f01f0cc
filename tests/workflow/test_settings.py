"""Settings: refused with field, value and cure, or good for what they start. The last tests generate them."""

import dataclasses
import math
import pickle
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import torch
from hypothesis import given, reject
from hypothesis import settings as examples
from hypothesis import strategies as st

from harmonica.cli.sample import SampleCommand
from harmonica.core.plan_builders import even_plan, fastest_speedup, slowest_speedup
from harmonica.data.batch import Batch
from harmonica.models.base import Macs, freeze
from harmonica.models.dit.model import DiT, DiTConfig
from harmonica.models.loading import ModelConfig
from harmonica.pretraining.train_classifier import ClassifierTraining
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.config import TrainingConfig
from harmonica.training.feasibility import check_training
from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.multi_target import MultiTargetTrainer
from harmonica.training.plans.search import StepSearch
from harmonica.training.sdt_config import SdtConfig
from harmonica.validation.settings import SettingError
from pipelines.compare.methods import learned_methods
from pipelines.config.compare import CompareConfig
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.promotion import PromoteConfig
from pipelines.config.serve import ServeConfig
from pipelines.config.sweep import SweepConfig
from pipelines.config.workflow import PromptsConfig, TrainConfig, WorkflowConfig
from pipelines.preflight import check_comparison, check_trials
from pipelines.presets import PRESETS, fashion
from pipelines.pretrain.dit import DiTPretrainConfig
from pipelines.pretrain.text_to_image import TextPretrainConfig
from pipelines.serving.application import make_application
from pipelines.serving.auth import load_keys
from pipelines.serving.serve_args import ServeArgs
from pipelines.sweep.trial import trials_of

NAN, INF = float("nan"), float("inf")
SECTIONS: dict[str, type] = {
    "": WorkflowConfig,
    "model": ModelConfig,
    "model.shape": DiTConfig,
    "sampler": SamplerConfig,
    "prompts": PromptsConfig,
    "train": TrainConfig,
    "train.sdt": SdtConfig,
    "train.forecast": ForecastConfig,
    "evaluate": EvaluateConfig,
    "sweep": SweepConfig,
    "promotion": PromoteConfig,
    "serve": ServeConfig,
    "compare": CompareConfig,
}
FIELDS = {
    (section, field.name): field for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)
}
NAMES = {f"{section}.{name}".lstrip(".") for section, name in FIELDS} | {"from"}


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


@pytest.mark.parametrize(
    ("cls", "given", "words"),
    [
        (TrainingConfig, {"start_trajectories": -1}, "train.start_trajectories is -1: give 0 or more"),
        (TrainingConfig, {"initial_logit": NAN}, "train.initial_logit is nan: give -100 to 100"),
        (TrainingConfig, {"checkpoint_interval_s": -5}, "train.checkpoint_interval_s is -5: give 0 or more"),
        (TrainingConfig, {"target_speedup": INF}, "train.target_speedup is inf: give a number above 1, or 0"),
        (
            TrainingConfig,
            {"targets": (1.5, NAN)},
            r"train.targets is (1.5, nan): give at most 20 numbers above",
        ),
        (
            TrainingConfig,
            {"trajectories": True},
            "train.trajectories is True: give a whole number, 1 or more",
        ),
        (TrainingConfig, {"trajectories": "3"}, "train.trajectories is '3': give a whole number, 1 or more"),
        (TrainingConfig, {"trajectories": 2.5}, "train.trajectories is 2.5: give a whole number, 1 or more"),
        (TrainingConfig, {"shard_model": 1}, "train.shard_model is 1: give True or False"),
        (
            TrainingConfig,
            {"choice_trajectories": 2},
            "train.choice_trajectories is 2: give 0 with train.initial",
        ),
        (SdtConfig, {"learning_rate": INF}, "train.sdt.learning_rate is inf: give a number above 0, at most"),
        (SdtConfig, {"learning_rate": NAN}, "train.sdt.learning_rate is nan: give a number above 0, at most"),
        (
            TrainConfig,
            {"stall_timeout_s": INF},
            "train.stall_timeout_s is inf: give a finite number of seconds",
        ),
        (DiTPretrainConfig, {"batch_size": 0}, "batch_size is 0: give 1 or more"),
        (TextPretrainConfig, {"tone_share": 2.0}, "tone_share is 2.0: give 0 to 1"),
        (ClassifierTraining, {"learning_rate": NAN}, "learning_rate is nan: give a finite number above 0"),
        (SamplerConfig, {"guidance_scale": NAN}, "sampler.guidance_scale is nan: give 1 to 50"),
        (SamplerConfig, {"scheduler": 3}, "sampler.scheduler is 3: give a dict"),
        (ModelConfig, {"cacheable": ()}, "model.cacheable is (): give some of attn, cross, mlp"),
        (ModelConfig, {"path": None}, "model.path is None: give text"),
        (DiTConfig, {"patch_size": 3}, "model.shape.sample_size is 32: give a multiple of model.shape.patch"),
        (ServeConfig, {"num_cpus": 1.5}, "serve.num_cpus is 1.5: give a whole number, or a part of one core"),
        (
            WorkflowConfig,
            {"seed": 2**62},
            "seed is 4611686018427387904: give a whole number from 0, below 2^62",
        ),
        (WorkflowConfig, {"done_again_from": "x"}, "from is 'x': give one of prompts, train"),
        (WorkflowConfig, {"stages": ("trian",)}, "stages is ('trian',): give some of prompts, train"),
        (SampleCommand, {"rounds": 0}, "rounds is 0: give 1 or more"),
    ],
)
def test_a_refused_setting_says_field_value_and_cure(cls: type, given: dict, words: str) -> None:
    with pytest.raises(SettingError) as caught:
        cls(**given)
    assert str(caught.value).startswith(words)


def test_what_is_no_setting_at_all_is_an_error_of_the_program() -> None:
    with pytest.raises(TypeError, match="TrainingConfig has no such setting or lacks one: 'trajektories'"):
        TrainingConfig(trajektories=3)  # type: ignore[call-arg]


def test_settings_are_frozen_values_that_travel_and_are_copied() -> None:
    for preset in PRESETS.values():
        config = preset()
        assert pickle.loads(pickle.dumps(config)) == config
        assert dataclasses.replace(config) == config
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.train.trajectories = 3  # type: ignore[misc]
    assert SweepConfig(targets=[1.5, 2]).targets == (1.5, 2.0)  # type: ignore[arg-type]  # as YAML has it


# What the model and its steps can be trained for.

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


# Generated settings.


def odd_values() -> st.SearchStrategy[Any]:
    """What a field may be given by mistake, or on purpose at the edge of what it takes."""
    numbers = [NAN, INF, -INF, -1, 0, 1, 2, 3, 0.5, 1.5, 1e-30, 1e30, 2**62, -0.0, True]
    return st.sampled_from([*numbers, None, "", "x", "3", (), (2.0,), (NAN,), (0, 0), {}])


def good_values(annotation: Any) -> st.SearchStrategy[Any]:
    """What the type says, mostly within the bounds."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return good_values(inner[0])
    if origin in (Union, types.UnionType):
        return st.one_of(*[good_values(one) for one in inner])
    if origin is Literal:
        return st.sampled_from(inner)
    if origin is tuple:
        return st.lists(good_values(inner[0]), max_size=3, unique=True).map(tuple)
    kinds: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(1, 9),
        float: st.one_of(st.sampled_from([0.0, 0.3, 1.0, 1.4, 40.0]), st.floats(0, 4)),
        str: st.sampled_from(["", "name"]),
        types.NoneType: st.none(),
    }
    return kinds.get(annotation, st.nothing())


CHANGEABLE = [
    key
    for key, field in FIELDS.items()
    if not dataclasses.is_dataclass(field.type) and key not in {("model", "shape"), ("model", "path")}
]


@st.composite
def changes(draw: st.DrawFn, sections: tuple[str, ...] = tuple(SECTIONS)) -> dict[tuple[str, str], Any]:
    """Some settings and what they are given."""
    keys = [key for key in CHANGEABLE if key[0] in sections]
    chosen = draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3, unique=True))
    drawn = {}
    for key in chosen:
        is_odd = draw(st.sampled_from((False, False, False, True)))
        drawn[key] = draw(odd_values() if is_odd else good_values(FIELDS[key].type))
    return drawn


def built(changed: dict[tuple[str, str], Any], base: WorkflowConfig) -> WorkflowConfig:
    """The base with the changes, made from the inside out as the command line makes it."""

    def of(section: str, before: Any) -> Any:
        ours = {name: value for (where, name), value in changed.items() if where == section}
        for other in SECTIONS:
            outer, _, name = other.rpartition(".")
            if other and outer == section and other != "model.shape":
                ours.setdefault(name, of(other, getattr(before, name)))
        return dataclasses.replace(before, **ours)

    if shape := {name: value for (where, name), value in changed.items() if where == "model.shape"}:
        DiTConfig(**shape)
    made: WorkflowConfig = of("", base)
    return made


def trainings(config: WorkflowConfig) -> Iterator[TrainingConfig]:
    """All that the stages train, sweep and compare would start, each checked as they check it."""
    check_training(config.train, MODEL, config.sampler.num_inference_steps)
    yield config.train
    check_trials(config, MODEL)
    yield from (trial.settings(config).train for trial in trials_of(config))
    check_comparison(config, MODEL)
    for target in config.compare.targets:
        yield from learned_methods(config.train, target, with_baselines=config.compare.learners).values()


def assert_said_well(error: ValueError, changed: dict[tuple[str, str], Any]) -> None:
    text = str(error)
    found = re.match(r"(\S+) is (.+?): (.+)", text)
    assert found and found[1] in NAMES and "\n" not in text, text
    assert re.search(r"give|leave", found[3]), text
    spelled = {
        f"{section}.{name}".lstrip(".").replace("done_again_from", "from") for section, name in changed
    }
    assert any(name in text for name in spelled), f"{text}: of {spelled}"


@examples(derandomize=True, max_examples=150)
@given(changed=changes())
def test_settings_start_what_they_are_for_or_are_refused(changed: dict[tuple[str, str], Any]) -> None:
    base = dataclasses.replace(fashion(), compare=CompareConfig(targets=(1.4,)))
    try:
        config = built(changed, base)
        for train in trainings(config):
            MultiTargetTrainer(make_sampler(MODEL, config.sampler), train, seed=config.seed)
        load_keys(config.serve.api_keys_file)
    except ValueError as error:
        assert_said_well(error, changed)
        return
    if config.serve != base.serve:
        make_application(ServeArgs(serve=config.serve), {"log_level": "WARNING"})
    assert not any(isinstance(value, float) and not math.isfinite(value) for value in changed.values())


def train_one(run: MultiTargetTrainer) -> None:
    keys = SampleKeys.of(0, range(run.config.batch_size))
    noise = torch.from_numpy(keys.start_noise((1, 16, 16)))
    run.train_one(Batch(noise, torch.arange(run.config.batch_size) % 3, keys))


TRAINED = dataclasses.replace(
    fashion().train, trajectories=1, start_trajectories=1, choice_trajectories=1, batch_size=2, num_workers=1
)
NUMBERS = {"trajectories", "start_trajectories", "choice_trajectories", "probes", "rounds", "order"}


@examples(derandomize=True, max_examples=60)
@given(
    changed=changes(("train", "train.sdt", "train.forecast")),
    steps=st.integers(2, 6),
    start=st.sampled_from(["constant", "alternate", "normal", "even", "measured"]),
    target=st.sampled_from([{}, {"target_cur": 0.3}, {"target_speedup": 1.3}, {"target_psnr": 30.0}]),
)
def test_settings_that_pass_train_to_the_end(changed, steps, start, target) -> None:
    sampler = make_sampler(MODEL, SamplerConfig(num_inference_steps=steps))
    base = dataclasses.replace(
        fashion(), train=dataclasses.replace(TRAINED, forecast=ForecastConfig(trajectories=4))
    )
    changed = {("train", "initial"): start, **changed}
    changed |= {
        ("train", name): target.get(name, 0.0) for name in ("target_cur", "target_speedup", "target_psnr")
    }
    changed.setdefault(("train", "start_trajectories"), int(start == "measured"))
    changed.setdefault(("train", "choice_trajectories"), int(start in ("even", "measured")))
    try:
        train = built(changed, base).train
        run = MultiTargetTrainer(sampler, train, seed=0)
    except ValueError as error:
        assert_said_well(error, changed)
        return
    work = [train.all_trajectories, train.batch_size, train.forecast.probes, train.forecast.order]
    if max(work) > 20:
        reject()
    while run.trajectory < train.all_trajectories:
        train_one(run)
    for artifact in (run.artifact(), *run.extra_artifacts().values()):
        assert artifact.logits_TB.isfinite().all()
        assert artifact.forecast_TBK is None or artifact.forecast_TBK.isfinite().all()
