"""A training of so many minutes: its numbers fit, grow with the time, are told, kept and resumed."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from all_phases import ALL_PHASES
from tiny_dit import write_model

from harmonica.cli import train
from harmonica.cli.train import TrainCommand
from harmonica.core.artifact import RouterArtifact
from harmonica.data.samples import SampleSpec, Shard
from harmonica.models.loading import load_model
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.training import time_budget
from harmonica.training.budget import cut_to_budget, numbers_of, with_numbers, within_budget
from harmonica.training.config import TrainingConfig
from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.multi_target import MultiTargetTrainer
from harmonica.training.phases import all_phase_costs
from harmonica.training.presets import fashion
from harmonica.validation.settings import SettingError

STEPS = 9
SAMPLER = SamplerConfig(num_inference_steps=STEPS, guidance_scale=1.5)
PRESET = dataclasses.replace(fashion().train, targets=(1.5, 3.0))
LONG = dataclasses.replace(
    ALL_PHASES, trajectories=5, start_trajectories=2, forecast=ForecastConfig(trajectories=12, probes=1)
)
MINUTES = [0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 20.0, 60.0, 600.0]


def samplings(config: TrainingConfig, num_steps: int = 20, place: int = 0, from_start: bool = False) -> float:
    phases = all_phase_costs(config, num_steps, from_start=from_start)[place:]
    return sum(sum(phase.costs) for phase in phases)


def of(config: TrainingConfig, minutes: float) -> TrainingConfig:
    return dataclasses.replace(config, budget=minutes)


@pytest.mark.parametrize("from_start", [False, True])
def test_the_numbers_fit_into_the_time_and_use_it_and_grow_with_it(from_start) -> None:
    pace, before = 0.05, None
    for minutes in MINUTES:
        fitted = within_budget(of(PRESET, minutes), 20, pace, from_start=from_start)
        seconds = pace * samplings(fitted, from_start=from_start)
        assert seconds <= 0.9 * 60 * minutes
        numbers = numbers_of(fitted)
        if before is not None:
            assert all(numbers[name] >= before[name] for name in numbers)
        before = numbers
        if 1.0 <= minutes <= 8.0:  # by a trajectory of each phase of each speed it would be more
            assert seconds > 0.75 * 0.9 * 60 * minutes
    assert before == {"start": 12, "router": 1000, "choice": 6, "forecast": 60}


def test_other_settings_stay_and_time_that_is_spent_is_not_there() -> None:
    fitted = within_budget(of(PRESET, 3.0), 20, 0.3)
    assert with_numbers(fitted, numbers_of(PRESET)) == of(PRESET, 3.0)
    less = within_budget(of(PRESET, 3.0), 20, 0.3, spent_s=60.0)
    assert samplings(less) < samplings(fitted)


def test_phases_that_are_left_out_stay_out() -> None:
    plain = within_budget(of(TrainingConfig(target_speedup=1.5), 5.0), 20, 0.3)
    assert numbers_of(plain) | {"router": 0} == dict.fromkeys(numbers_of(plain), 0)
    assert plain.trajectories > TrainingConfig().trajectories


def test_too_short_a_time_is_refused_with_the_least_that_does() -> None:
    with pytest.raises(SettingError, match=r"^train\.budget is 0\.1: .* takes (\S+) minutes here") as refusal:
        within_budget(of(PRESET, 0.1), 20, 0.6)
    least = float(str(refusal.value).split("takes ")[1].split()[0])
    fitted = numbers_of(within_budget(of(PRESET, least), 20, 0.6))
    assert fitted == {"start": 1, "router": 1, "choice": 1, "forecast": 6}
    with pytest.raises(SettingError, match=f"takes {least:g} minutes"):
        within_budget(of(PRESET, 0.85 * least), 20, 0.6)
    with pytest.raises(SettingError, match=r"train\.budget is -1\.0: give minutes above 0, or 0 for none"):
        of(PRESET, -1.0)


def test_a_router_without_a_start_learns_for_a_while_at_least() -> None:
    plain = of(TrainingConfig(target_speedup=1.5, trajectories=300), 20.0)
    with pytest.raises(SettingError, match="budget"):
        within_budget(plain, 20, 16.0)
    assert within_budget(plain, 20, 11.0).trajectories >= 20


def test_the_phases_to_come_are_cut_where_the_pace_is_too_slow() -> None:
    planned = within_budget(of(PRESET, 4.0), 20, 0.2)
    place, names = 2, [phase.name for phase in all_phase_costs(planned, 20)]
    assert names[:3] == ["start", "router", "choice"]
    spent = 0.2 * (samplings(planned) - samplings(planned, place=place))
    assert cut_to_budget(planned, 20, place, 0.2, spent_s=spent) is planned
    cut = cut_to_budget(planned, 20, place, 0.3, spent_s=1.5 * spent)
    assert 1.5 * spent + 0.3 * samplings(cut, place=place) <= 240
    assert cut.start_trajectories == planned.start_trajectories
    assert all(count <= numbers_of(planned)[name] for name, count in numbers_of(cut).items())
    least = numbers_of(cut_to_budget(planned, 20, place, 9.0, spent_s=999.0))
    assert least == numbers_of(planned) | {"router": 1, "choice": 1, "forecast": 6}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory):
    loaded = load_model(write_model(tmp_path_factory.mktemp("model")))
    sampler, spec = make_sampler(loaded.model, SAMPLER), SampleSpec.of(loaded.model, 0)
    return lambda config: (MultiTargetTrainer(sampler, config, seed=0), spec)


def at_pace(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(time_budget, "sampling_seconds", lambda *_: seconds)


def same(one: RouterArtifact, other: RouterArtifact) -> bool:
    return torch.equal(one.logits_TB, other.logits_TB) and torch.equal(one.forecast_TBK, other.forecast_TBK)


def minutes_for(config: TrainingConfig, pace: float) -> float:
    return pace * samplings(config, STEPS) / 60 / 0.9 * 1.001


def test_it_can_be_repeated_by_its_numbers_and_resumed_with_them(fresh, monkeypatch) -> None:
    family = dataclasses.replace(LONG, targets=(1.5,))
    wanted = with_numbers(family, {"start": 1, "router": 2, "forecast": 12})
    config = of(family, 1000 * minutes_for(wanted, 1.0))  # no clock of this machine comes near it
    at_pace(monkeypatch, 1000.0)
    run, spec = fresh(config)
    kept = {}
    for _ in train.trained(run, spec, Shard(2)):
        kept[run.trajectory] = copy.deepcopy(run.state())
    said = run.artifact(**dataclasses.asdict(config)).training
    again = dataclasses.replace(
        family,
        start_trajectories=said["start_trajectories"],
        trajectories=said["router_trajectories"],
        choice_trajectories=said["choice_trajectories"],
        forecast=ForecastConfig(**said["forecast"]),
    )
    assert numbers_of(again) != numbers_of(family)
    assert run.trajectory == run.all_trajectories == again.all_trajectories
    repeated, _ = fresh(again)
    list(train.trained(repeated, spec, Shard(2)))
    assert same(repeated.artifact(), run.artifact())
    assert same(repeated.extra_artifacts()["1.5x"], run.extra_artifacts()["1.5x"])
    assert "router_trajectories" not in repeated.artifact().training

    monkeypatch.setattr(time_budget, "sampling_seconds", lambda *_: pytest.fail("it was timed before"))
    for stop in (1, 4, run.all_trajectories - 3):
        resumed, _ = fresh(config)
        resumed.load_state(kept[stop])
        assert resumed.trajectory == stop and resumed.all_trajectories == run.all_trajectories
        list(train.trained(resumed, spec, Shard(2)))
        assert same(resumed.extra_artifacts()["1.5x"], run.extra_artifacts()["1.5x"])


@pytest.mark.parametrize(
    ("slow", "end", "left"),
    [(1, 2, 1 + 1 + 6), (7, 8, 6)],
    ids=["while the start is measured", "while the plan is chosen"],
)
def test_a_slow_machine_cuts_at_the_end_of_a_phase_and_a_resumed_run_repeats_it(
    fresh, monkeypatch, slow, end, left
) -> None:
    now = 0.0
    monkeypatch.setattr(time_budget, "time", SimpleNamespace(monotonic=lambda: now))
    at_pace(monkeypatch, 1.0)
    config = of(LONG, minutes_for(LONG, 1.0))
    run, spec = fresh(config)
    counts, kept, messages = [], {}, []
    metrics = {}
    for metrics in train.trained(run, spec, Shard(2)):  # noqa: B007  # the last
        now += 200.0 if run.trajectory == slow else 0.0
        counts.append(run.all_trajectories)
        kept[run.trajectory] = copy.deepcopy(run.state())
        messages.append(run.announcement)
    assert counts[0] == LONG.all_trajectories == 20
    before, after = set(counts[: end - 1]), set(counts[end - 1 :])
    assert (before, after) == ({20}, {end + left}), "never but at the end of a phase"
    assert run.trajectory == end + left
    assert "forecast.ridge" in metrics, "the last of fewer trajectories ends the fit"
    assert messages[end - 1].endswith(f": {left} trajectories follow, not {20 - end}")
    resumed, _ = fresh(config)
    resumed.load_state(kept[end + 1])
    list(train.trained(resumed, spec, Shard(2)))
    assert resumed.trajectory == run.trajectory and same(resumed.artifact(), run.artifact())
    repeated, _ = fresh(with_numbers(LONG, run.trainers[0].numbers))
    list(train.trained(repeated, spec, Shard(2)))
    assert same(repeated.artifact(), run.artifact())


def test_a_machine_that_was_slow_for_a_while_gets_its_planned_numbers_back(fresh, monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr(time_budget, "time", SimpleNamespace(monotonic=lambda: now))
    at_pace(monkeypatch, 1.0)
    config = of(LONG, minutes_for(LONG, 1.0))
    run, spec = fresh(config)
    counts = []
    for _ in train.trained(run, spec, Shard(2)):
        # At ten times the planned pace while the start is measured; no time passes later.
        now += 10 * run.progress.cost(1) if run.trajectory == 1 else 0.0
        counts.append(run.all_trajectories)
    start_s, budget_s = 10 * run.progress.cost(1), 60 * config.budget
    assert start_s < budget_s < start_s + 1.5 * (run.progress.cost() - run.progress.cost(2))
    assert counts[0] == 20 and counts[1] < 20
    assert numbers_of(run.trainers[0].config)["forecast"] == LONG.forecast.trajectories
    assert numbers_of(run.trainers[0].config)["router"] < LONG.trajectories, "it had begun"


def test_the_command_says_beforehand_what_it_will_do_and_leaves_its_numbers(tmp_path, monkeypatch) -> None:
    model, said = write_model(tmp_path / "model"), []
    least = TrainCommand(output=tmp_path / "run", model=model, sampler=SAMPLER, train=of(LONG, 1e-6))
    with pytest.raises(SettingError, match=r"train\.budget is 1e-06"):
        train.train(least, said.append)
    assert not said and not (tmp_path / "run").exists()
    command = dataclasses.replace(least, train=of(LONG, 600.0), output=tmp_path / "long")
    at_pace(monkeypatch, 600 / minutes_for(LONG, 1.0))
    artifact = train.train(command, said.append)
    assert said[0].startswith(
        "train.budget is 600 minutes: measuring the start 2, training the router 5, choosing the plan 1, "
        "fitting the forecasts 12 trajectories; about 539 minutes at "
    )
    assert artifact.training["router_trajectories"] == 5 and artifact.training["trajectories"] == 20
    assert artifact.training["forecast"]["trajectories"] == 12
