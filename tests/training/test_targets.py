"""Training for a speed: even and measured starts, the cut, the choice, and what is refused."""

import math
from dataclasses import replace
from itertools import groupby, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latent_rows import rows
from metrics_without_times import without_times
from torch import Tensor

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.plan_builders import (
    even_plan,
    even_steps,
    reusable_fraction,
    steps_for,
    stepwise_plan,
    threshold_for,
)
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.models.base import Macs
from harmonica.models.dit.model import DiT
from harmonica.samplers import Sampler, SamplerConfig, make_sampler
from harmonica.training.config import TrainingConfig
from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.forecast_phase import ForecastPhase
from harmonica.training.plans.search import StepSearch
from harmonica.training.plans.selection import SMALLEST_ERROR, PlanSelector, psnr_of
from harmonica.training.plans.step_form import LINEAR
from harmonica.training.sampler_backend import SamplerBackend
from harmonica.training.sdt_config import SdtConfig
from harmonica.training.trainer import RouterTrainer
from harmonica.validation.settings import SettingError

STEPS = 9
MACS = Macs(branches=(30, 60) * 6, rest=12)
FORECAST = SdtConfig(reuse="forecast", threshold=0.5, learning_rate=0.1, epsilon=1e-20, penalty="macs")
SPEED = TrainingConfig(
    target_speedup=1.4, initial="even", initial_logit=2.0, trajectories=2, batch_size=4, sdt=FORECAST
)


@pytest.fixture
def sampler(tiny_dit: DiT) -> Sampler:
    config = SamplerConfig(num_inference_steps=STEPS, guidance_scale=1.5, clip_sample=False)
    return make_sampler(tiny_dit, config)


def train(run: RouterTrainer, until: int) -> list[dict[str, float]]:
    return [run.train_one(rows(4 * k)) for k in range(run.trajectory, until)]


@given(num_steps=st.integers(8, 60), speedup=st.floats(1.05, 1.9))
def test_even_plans_meet_their_speed_without_two_steps_running(num_steps, speedup):
    plan = even_plan(num_steps, MACS, speedup)
    assert abs(plan.ideal_speedup(MACS) / speedup - 1) < 0.02
    reused = [not all(row) for row in plan.compute]
    if steps_for(num_steps, MACS, speedup)[0] <= (num_steps - 1) // 2:
        assert not any(a and b for a, b in pairwise(reused))
    assert sum(any(row) and not all(row) for row in plan.compute) <= 1, "one step in part at most"


def test_every_third_and_every_second_step_are_even():
    assert even_steps(20, 6) == [2, 5, 8, 11, 14, 17]
    assert even_steps(20, 10) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]


def test_gaps_are_equal_and_the_last_steps_are_computed():
    assert even_steps(20, 7) == [5, 7, 9, 11, 13, 15, 17]
    assert even_steps(20, 4) == [5, 9, 13, 17]
    assert even_steps(50, 20) == [9, *range(11, 48, 2)]


def test_beyond_half_runs_are_as_equal_as_can_be_and_the_first_one_is_short():
    assert even_steps(20, 13) == [0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 16, 18]
    assert even_steps(28, 19, is_flow_matching=True) == [
        *(0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 15, 17, 18, 20, 21, 23, 24, 26)
    ]
    assert even_steps(20, 18) == [*range(12), *range(13, 19)], "a single one is computed, in the middle"


@given(num_steps=st.integers(2, 100), share=st.floats(0, 1), is_flow_matching=st.booleans())
def test_even_steps_are_as_many_as_asked_for_in_runs_of_about_one_length(num_steps, share, is_flow_matching):
    count = round(share * (num_steps - 1))
    steps = even_steps(num_steps, count, is_flow_matching=is_flow_matching)
    assert len(set(steps)) == count and steps == sorted(steps)
    assert all(0 <= step <= num_steps - 2 for step in steps)
    runs = [len(list(run)) for _, run in groupby(enumerate(steps), lambda pair: pair[1] - pair[0])]
    inner = runs[1:-1]
    assert not inner or max(inner) - min(inner) <= 1
    if len(runs) > 2:
        assert max(runs[0], runs[-1]) <= max(inner) + 1 and runs[-1] <= max(inner)


def test_where_all_blocks_are_one_branch_a_part_of_a_step_is_left_out():
    one = Macs((100,), 0)
    speedup = 20 / (20 - 7.3)
    assert steps_for(20, one, speedup)[0] == 8
    assert (
        even_plan(20, one, speedup) == even_plan(20, one, 20 / 13) == stepwise_plan(20, 1, even_steps(20, 7))
    )
    nearer = even_plan(20, one, 20 / (20 - 7.7))
    assert nearer == stepwise_plan(20, 1, even_steps(20, 8))


def test_where_every_step_is_fixed_all_are_computed():
    fixed = {0, 1}
    assert even_plan(3, MACS, 1.3, fixed) == Plan.full(3, len(MACS.branches))
    search = StepSearch(3, 1)
    assert search.plans(MACS, 1.3, fixed) == [Plan.full(3, len(MACS.branches))]


@given(seed=st.integers(0, 1000), speedup=st.floats(1.05, 3.0))
def test_the_cut_meets_the_speed_and_reuses_the_lowest_scores(seed, speedup):
    generator = torch.Generator().manual_seed(seed)
    scores_TB = torch.rand(20, 12, generator=generator)
    tau = threshold_for(scores_TB, MACS, speedup)
    plan = Plan.from_scores(scores_TB, tau)
    assert abs(plan.ideal_speedup(MACS) / speedup - 1) < 0.02
    assert torch.equal(plan.to_tensor()[:-1], scores_TB[:-1] > tau)


def test_scores_that_only_rounding_tells_apart_fall_on_one_side():
    scores_TB = torch.full((20, 12), 0.9, dtype=torch.float64)
    scores_TB[:10] = 0.2
    scores_TB[3] += 1e-9
    plan = Plan.from_scores(scores_TB, threshold_for(scores_TB, MACS, 1.7))
    assert plan.compute[:10] == ((False,) * 12,) * 10


def test_a_speed_beyond_reach_is_refused_with_the_highest():
    with pytest.raises(ValueError, match=r"train.target_speedup is 30.* reach \d+\.\d\d at most"):
        reusable_fraction(20, MACS, 30.0)


def test_trained_plans_meet_their_speed(sampler):
    run = RouterTrainer(sampler, SPEED, seed=0)
    train(run, 2)
    macs = sampler.model.macs()
    assert abs(run.artifact().ideal_speedup / 1.4 - 1) < 0.02
    assert run.artifact().plan.ideal_speedup(macs) == run.plan.ideal_speedup(macs)


def test_a_measured_start_is_nearer_than_an_even_one(sampler):
    config = replace(SPEED, initial="measured", start_trajectories=2)
    run = RouterTrainer(sampler, config, seed=0)
    train(run, 2)
    plans = {name: Plan.from_scores(logits.sigmoid(), 0.5) for name, logits in run.context.starts.items()}
    choice = PlanSelector(plans, "forecast")
    choice.observe(SamplerBackend(sampler), [rows(100, 16)], lambda tensor: None)
    assert choice.best == "measured"


def test_a_plan_under_two_names_is_drawn_once(sampler):
    drawn: list[Plan | None] = []

    class Watched(SamplerBackend):
        def images(self, batch: Batch, plan: Plan | None = None, reuse: Reuse = "hold") -> Tensor:
            drawn.append(plan)
            return super().images(batch, plan, reuse)

    steps, branches = sampler.num_steps, len(sampler.model.branches)
    one, other = (stepwise_plan(steps, branches, [i]) for i in (1, 2))
    choice = PlanSelector({"start": one, "other": other, "trained": one}, "forecast")
    metrics = choice.observe(Watched(sampler), [rows(0, 2), rows(2, 2)], lambda tensor: None)
    assert drawn == [None, one, other] * 2
    assert metrics["choice.trained_db"] == metrics["choice.start_db"] != metrics["choice.other_db"]
    alone = PlanSelector({"trained": one}, "forecast")
    assert alone.observe(SamplerBackend(sampler), [rows(0, 4)], lambda tensor: None) == pytest.approx(
        {"loss": metrics["loss"], "choice.trained_db": metrics["choice.trained_db"]}, rel=1e-5
    )


def test_the_nearest_plan_is_kept_and_says_whose_it_is(sampler):
    sdt = replace(FORECAST, learning_rate=0.5)
    config = replace(SPEED, initial_logit=0.5, trajectories=4, choice_trajectories=1, sdt=sdt)
    run = RouterTrainer(sampler, config, seed=0)
    start = run.plan
    train(run, 4)
    assert run.plan != start
    (metrics,) = train(run, 5)
    nearer = "start" if metrics["choice.start_db"] > metrics["choice.trained_db"] else "trained"
    assert run.context.chosen == nearer == run.artifact().training["chosen"]
    assert (run.plan == start) == (nearer == "start")


def test_a_trained_plan_that_misses_the_speed_is_not_kept(sampler):
    config = replace(SPEED, trajectories=4, choice_trajectories=1, sdt=FORECAST)
    run = RouterTrainer(sampler, config, seed=0)
    start = run.plan
    train(run, 4)
    with torch.no_grad():
        for row in run.router.rows:
            row.fill_(1.0)  # nothing to cut between
    run.load_state(run.state() | {"choice": None})  # of that router
    assert not run.context.target.is_met_by(run.plan) and run.context.target.is_met_by(start)
    train(run, 5)
    assert (run.context.chosen, run.plan) == ("start", start)


ALL_PHASES = replace(
    SPEED,
    initial="measured",
    start_trajectories=2,
    choice_trajectories=2,
    forecast=ForecastConfig(trajectories=8, probes=1),
)


def test_the_fit_decides_between_the_nearest_plans(sampler):
    run = RouterTrainer(sampler, ALL_PHASES, seed=0)
    train(run, 6)
    assert isinstance(run.phase, ForecastPhase)
    first, second = run.context.finalists
    assert list(run.phase.fits) == [first, second] and run.context.chosen == first
    fits = dict(run.phase.fits)
    assert fits[first].plan.compute != fits[second].plan.compute, "not the same under two names"
    train(run, 10)
    assert run.phase.fits == fits, "a first round is followed by a second one's first measurements"
    *_, metrics = train(run, 12)
    reached = {name: metrics[f"finalist.{name}_psnr"] for name in (first, second)}
    best = max(reached, key=lambda name: reached[name])
    assert run.context.chosen == best and run.phase.fits == {best: fits[best]}
    assert run.plan.compute == fits[best].plan.compute, "the router's plan is the fitted one"
    # And these are the PSNRs of the fitted plans, on the trajectory that tried them and the two after it.
    plans = {name: fit.planned() for name, fit in fits.items()}
    again = PlanSelector(plans, "forecast")
    for trajectory in (9, 10, 11):
        again.observe(SamplerBackend(sampler), [rows(4 * trajectory)], lambda tensor: None)
    assert {name: again.psnr(name) for name in plans} == pytest.approx(reached, rel=1e-6)
    train(run, ALL_PHASES.all_trajectories)
    artifact = run.artifact()
    assert artifact.training["chosen"] == best and artifact.plan.compute == fits[best].plan.compute


def test_plans_that_are_fitted_share_the_full_images(sampler, monkeypatch):
    run = RouterTrainer(sampler, ALL_PHASES, seed=0)
    train(run, 6)
    assert isinstance(run.phase, ForecastPhase) and len(run.phase.fits) == 2
    drawn, images = [], SamplerBackend.images

    def watched(self, batch, plan=None, reuse="hold"):
        drawn.append(plan)
        return images(self, batch, plan, reuse)

    monkeypatch.setattr(SamplerBackend, "images", watched)
    train(run, 10)  # three that measure and one that tries
    assert drawn.count(None) == 4


def test_a_run_of_all_phases_resumes_bit_for_bit(sampler):
    config = ALL_PHASES
    whole = RouterTrainer(sampler, config, seed=0)
    expected = train(whole, config.all_trajectories)
    run, found = RouterTrainer(sampler, config, seed=0), []
    for k in range(config.all_trajectories):
        state = run.state()
        run = RouterTrainer(sampler, config, seed=0)
        run.load_state(state)
        found += train(run, k + 1)
    for before, now in zip(expected, found, strict=True):
        assert without_times(before) == without_times(now)
    assert torch.equal(run.router.logits(), whole.router.logits())
    assert torch.equal(run.artifact().forecast_TBK, whole.artifact().forecast_TBK)


def test_a_quality_is_met_by_the_fastest_start_that_has_it(sampler):
    settings = {"initial": "measured", "start_trajectories": 1, "target_speedup": 0.0, "trajectories": 2}
    search = StepSearch(STEPS, 1, LINEAR)  # as for forecasts that are not fitted
    batch = rows(0)
    noise, labels, keys = batch.noise_NCHW, batch.condition_N, batch.keys
    search.observe(SamplerBackend(sampler), [batch], 4, lambda tensor: None)
    full = sample(sampler, noise, labels, keys=keys)

    def psnr(count: int) -> float:
        plan = stepwise_plan(STEPS, 6, search.best(count))
        images = sample(sampler, noise, labels, plan, reuse="forecast", keys=keys)
        return float(10 * torch.log10(4 / (images - full).square().flatten(1).mean(1)).mean())

    found = [psnr(count) for count in (1, 2, 3, 4)]
    run = RouterTrainer(sampler, replace(SPEED, **settings, target_psnr=(found[1] + found[2]) / 2), seed=0)
    metrics = train(run, 2)
    assert metrics[0]["psnr"] == pytest.approx(found[1], abs=1e-3)
    assert run.plan.cur == pytest.approx(2 / STEPS, abs=0.01)
    again = RouterTrainer(sampler, run.config, seed=0)
    again.load_state(run.state())
    assert train(again, 3)[0]["beta"] == train(run, 3)[0]["beta"] > 0
    macs = sampler.model.macs()
    speedup = stepwise_plan(STEPS, 6, search.best(2)).ideal_speedup(macs)
    for one in (run, again):
        said = one.artifact().training["found"]
        assert said == {"reused_steps": 2, "psnr": metrics[0]["psnr"], "macs_speedup": speedup}
    # Out of reach, it is refused with what is in reach; a training for that begins.
    too_near = RouterTrainer(sampler, replace(run.config, target_psnr=500.0), seed=0)
    words = (
        r"^train.target_psnr is 500: the nearest plan that reuses a step is at [\d.]+ dB here, give no more"
    )
    with pytest.raises(SettingError, match=words) as refused:
        train(too_near, 1)
    most = float(str(refused.value).split(" at ")[1].split()[0])
    told_apart = psnr_of(math.log10(SMALLEST_ERROR))
    assert most <= min(max(found), told_apart) < most + 0.1 + 1e-3
    train(RouterTrainer(sampler, replace(run.config, target_psnr=most), seed=0), 1)


def test_in_pairs_only_every_second_row_is_trained(sampler):
    sdt = SdtConfig(objective="pairwise", learning_rate=0.3, threshold=0.5)
    config = replace(SPEED, initial="constant", trajectories=3, iepo="none", sdt=sdt)
    run = RouterTrainer(sampler, config, seed=0)
    train(run, 3)
    moved = [
        bool((row != first).any()) for row, first in zip(run.router.logits(), run.context.starts["start"])
    ]
    assert [i for i, has_moved in enumerate(moved) if has_moved] == [1, 3, 5, 7]
    assert all(all(run.plan.compute[i]) for i in (0, 2, 4, 6, 8))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target_speedup": 0.9}, "train.target_speedup is 0.9"),
        ({"target_cur": 0.3}, "train.target_speedup is 1.4 and train.target_cur 0.3"),
        ({"target_speedup": 0.0}, "train.initial is 'even' and train.target_speedup 0"),
        ({"target_psnr": 40.0}, "train.target_psnr is 40.0: .* 0 for train.target_speedup"),
        (
            {"target_psnr": 40.0, "target_speedup": 0.0},
            "train.target_psnr is 40.0: give train.initial measured",
        ),
        ({"choice_trajectories": -1}, "train.choice_trajectories is -1"),
        ({"start_trajectories": 1}, "train.start_trajectories is 1 and train.initial 'even'"),
        ({"initial": "measured"}, "train.start_trajectories is 0 and train.initial 'measured'"),
        ({"initial": "odd"}, "train.initial is 'odd'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        replace(SPEED, **changes)
