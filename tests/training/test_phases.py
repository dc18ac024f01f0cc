"""What a training's phases cost and how much time is left: nearly right from the first trajectory on."""

import dataclasses

import pytest
from all_phases import ALL_PHASES
from tiny_dit import write_model

from harmonica.models.loading import load_model
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.multi_target import MultiTargetTrainer
from harmonica.training.phases import all_phase_costs, phase_costs
from harmonica.training.presets import fashion
from harmonica.training.progress import Progress

STEPS = 20
RECORDED = dataclasses.replace(
    fashion().train,
    start_trajectories=3,
    trajectories=20,
    iepo_every=10,
    choice_trajectories=3,
    forecast=ForecastConfig(trajectories=16, rounds=1, finalists=1),
)
SECONDS = [
    *(3.66, 3.46, 3.63),
    *(8.86, 1.87, 1.96, 1.87, 1.89, 1.85, 1.91, 1.85, 1.90, 1.98),
    *(9.38, 1.93, 1.91, 1.86, 1.79, 1.83, 1.93, 1.87, 1.81, 1.80),
    *(2.75, 2.82, 2.84),
    *(2.50, 2.26, 2.28, 2.20, 2.20, 2.20, 2.19, 2.23, 2.23, 2.15, 2.20, 2.10, 2.20, 2.25, 3.04, 2.93),
]
"""CPU seconds of each trajectory of `RECORDED`, of one worker on one core: the built-in model, 4 rows.

Measured later: the last two, which try solutions of the fit, where a full sampling took 0.58 s; the start and
the choice between six plans, where it took 0.575 and 1.5 s, and which are scaled to the others.
"""
FULL_SAMPLING_S = 0.62
"""Of the same 4 rows on the same core."""


def test_a_trajectory_takes_what_its_arithmetic_says() -> None:
    costs = [cost for phase in phase_costs(RECORDED, STEPS) for cost in phase.costs]
    assert len(costs) == len(SECONDS) == RECORDED.all_trajectories
    for cost, seconds in zip(costs, SECONDS, strict=True):
        assert seconds / FULL_SAMPLING_S == pytest.approx(cost, rel=0.2)


def test_the_fit_takes_as_long_as_it_has_finalists() -> None:
    one = ForecastConfig(trajectories=8, finalists=1)
    costs, alone = (
        phase_costs(dataclasses.replace(RECORDED, forecast=forecast), STEPS)[-1].costs
        for forecast in (dataclasses.replace(one, finalists=2), one)
    )
    assert costs == (*(1 + 2 * (cost - 1) for cost in alone[:6]), *alone[6:]), "full images are shared"
    # Full samplings on one core, measured beside each trajectory: 7.2, 7.3 and 7.5.
    assert costs[0] == pytest.approx(7.3, rel=0.2)
    two = dataclasses.replace(one, finalists=2)
    unordered = dataclasses.replace(RECORDED, choice_trajectories=0, forecast=two)
    assert phase_costs(unordered, STEPS)[-1].costs == alone, "there is nothing to decide between"


def test_the_time_left_is_right_within_a_quarter_from_the_first_trajectory_to_the_last() -> None:
    progress = Progress(phase_costs(RECORDED, STEPS))
    before = None
    for done in range(1, len(SECONDS)):
        passed, truth = sum(SECONDS[:done]), sum(SECONDS[done:])
        phase_left, all_left = progress.seconds_left(done, 0, passed)
        assert truth / 1.25 < all_left < truth * 1.25
        end = sum(phase.trajectories for phase in progress.phases[: progress.place(done) + 1])
        assert phase_left == pytest.approx(sum(SECONDS[done:end]), rel=0.25)
        if before is not None:  # and it runs down with the clock, as far as it can be told
            assert all_left - before == pytest.approx(-SECONDS[done - 1], abs=0.06 * sum(SECONDS))
        before = all_left


def test_a_resumed_training_goes_by_its_own_time() -> None:
    progress = Progress(phase_costs(RECORDED, STEPS))
    _, left = progress.seconds_left(30, 26, 2 * sum(SECONDS[26:30]))
    assert left == pytest.approx(2 * sum(SECONDS[30:]), rel=0.1)


def test_lines_name_the_phase_and_what_follows() -> None:
    progress = Progress(phase_costs(RECORDED, STEPS))
    assert progress.message(2) == "measuring the start: 2 of 3 trajectories"
    assert progress.message(3) == "training the router: 0 of 20 trajectories"
    assert progress.message(42) == "fitting the forecasts: 16 of 16 trajectories"
    assert progress.time_left_message(25, 0, 90.0).endswith(" in all; then fitting the forecasts")
    assert progress.time_left_message(42, 0, 90.0) == "0:00:00 left"
    left = progress.time_left_message(2, 0, 24.0)
    assert left == (
        "0:00:12 left in this phase, 0:05:35 in all; then training the router, choosing the plan, "
        "fitting the forecasts"
    )


def test_a_family_has_the_start_once_and_names_its_speeds() -> None:
    config = dataclasses.replace(RECORDED, targets=(1.5,))
    phases = all_phase_costs(config, STEPS)
    assert sum(phase.trajectories for phase in phases) == config.all_trajectories
    assert [phase.message for phase in phases[:2]] == ["measuring the start", "training the router for 1.8x"]
    assert phases[-1].message == "fitting the forecasts for 1.5x"
    assert sum(phase.name == "start" for phase in phases) == 1


SMALL = dataclasses.replace(ALL_PHASES, start_trajectories=2)


@pytest.fixture
def sampler(tmp_path):
    model = load_model(write_model(tmp_path / "model")).model
    return make_sampler(model, SamplerConfig(num_inference_steps=9, guidance_scale=1.5))


def test_a_run_goes_through_the_phases_that_it_is_said_to(sampler) -> None:
    run, names = MultiTargetTrainer(sampler, SMALL, seed=0), []
    from harmonica.cli.train import trained
    from harmonica.data.samples import SampleSpec, Shard

    for metrics in trained(run, SampleSpec.of(sampler.model, 0), Shard(SMALL.batch_size)):
        kinds = {name.removeprefix("seconds.") for name in metrics if name.startswith("seconds.")}
        names.append(next((one for one in ("start", "choice", "forecast") if one in kinds), "router"))
    assert names == [phase.name for phase in all_phase_costs(SMALL, 9) for _ in phase.costs]
