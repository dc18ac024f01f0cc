"""Settings: refused with field, value and cure, frozen, and copied."""

import dataclasses
import pickle

import pytest

from harmonica.cli.sample import SampleCommand
from harmonica.models.dit.model import DiTConfig
from harmonica.models.loading import ModelConfig
from harmonica.samplers import SamplerConfig
from harmonica.training.config import TrainingConfig
from harmonica.training.sdt_config import SdtConfig
from harmonica.validation.settings import SettingError
from pipelines.config.serve import ServeConfig
from pipelines.config.sweep import SweepConfig
from pipelines.config.workflow import TrainConfig, WorkflowConfig
from pipelines.presets import PRESETS
from pipelines.pretrain.dit import DiTPretrainConfig
from pipelines.pretrain.text_to_image import TextPretrainConfig
from pipelines.pretrain.train_classifier import ClassifierTraining

NAN, INF = float("nan"), float("inf")


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
