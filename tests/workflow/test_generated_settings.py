"""Settings as hypothesis generates them: good for what they start, or refused with field, value and cure."""

import dataclasses
import math
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import given, reject
from hypothesis import settings as examples
from hypothesis import strategies as st

from harmonica.models.dit.model import DiTConfig
from harmonica.models.loading import ModelConfig
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.training.config import TrainingConfig
from harmonica.training.feasibility import check_training
from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.multi_target import MultiTargetTrainer
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
from pipelines.presets import fashion
from pipelines.serving.application import make_application
from pipelines.serving.auth import load_keys
from pipelines.serving.serve_args import ServeArgs
from pipelines.sweep.trial import trials_of
from tests.workflow.test_settings import INF, NAN
from tests.workflow.test_settings_reach import MODEL, train_one

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
    try:
        while run.trajectory < train.all_trajectories:
            train_one(run)
    except SettingError as error:
        if not str(error).startswith("train.target_psnr is 30: the nearest plan"):
            raise
        return  # no plan of this model has that quality
    for artifact in (run.artifact(), *run.extra_artifacts().values()):
        assert artifact.logits_TB.isfinite().all()
        assert artifact.forecast_TBK is None or artifact.forecast_TBK.isfinite().all()
