"""A start is refined: its computed steps move to where the image changes less, also among runs of reuse."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from all_phases import ALL_PHASES
from metrics_without_times import without_times
from tiny_dit import write_model

from harmonica.cli.train import trained
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.data.samples import SampleSpec, Shard, make_samples
from harmonica.models.loading import load_model
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.training.config import TrainingConfig
from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.multi_target import MultiTargetTrainer
from harmonica.training.phases import all_phase_budgets
from harmonica.training.plans.builders import even_plan, stepwise_plan
from harmonica.training.plans.refine import PlanRefiner, moved, moves_of, plan_latents
from harmonica.training.sampler_backend import SamplerBackend
from harmonica.training.trainer import RouterTrainer

STEPS, BRANCHES = 12, 6
REFINED = replace(
    ALL_PHASES,
    target_speedup=3.0,
    initial="even",
    start_trajectories=0,
    refine_rounds=2,
    forecast=ForecastConfig(),
    batch_size=4,
)


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    model = load_model(write_model(tmp_path_factory.mktemp("model"))).model
    return make_sampler(model, SamplerConfig(num_inference_steps=STEPS, guidance_scale=1.5))


def rows(sampler, first: int, count: int = 4) -> Batch:
    spec = SampleSpec.of(sampler.model, 0)
    return spec.to_batch(make_samples(np.arange(first, first + count), spec), "cpu")


def plan_with(*computed: int):
    return stepwise_plan(STEPS, BRANCHES, set(range(STEPS)) - {STEPS - 1, *computed})


def on_one_worker(_: torch.Tensor) -> None:
    """The mean over all of them."""


def test_computed_steps_move_to_reused_neighbours() -> None:
    plan = plan_with(2, 3, 7)
    assert moves_of(plan) == [(2, 1), (3, 4), (7, 6), (7, 8)]
    assert moves_of(plan, fixed=[3, 8]) == [(2, 1), (7, 6), (7, 8)], "fixed steps stay computed"
    part = [list(row) for row in plan.compute]
    part[6][0] = True
    with_part = type(plan)(tuple(map(tuple, part)))
    assert (7, 6) not in moves_of(with_part), "a step that is reused in part stays where it is"
    assert moved(plan, [(2, 1), (7, 8)]) == plan_with(1, 3, 8)


def test_latents_are_those_of_each_plan(sampler) -> None:
    batch = rows(sampler, 0)
    plans = [plan_with(2, 6), plan_with(2, 7), plan_with(1, 6), plan_with(2, 6)]
    latents = plan_latents(sampler, batch, plans, "forecast")
    for plan, found in zip(plans, latents, strict=True):
        images = sample(sampler, batch.noise_NCHW, batch.condition_N, plan, reuse="forecast", keys=batch.keys)
        torch.testing.assert_close(found, images.flatten(1))


def test_moves_are_taken_while_their_sum_lowers_the_error() -> None:
    """The first two cancel the error between them, the third is their opposite, the fourth shares a step."""
    refiner = PlanRefiner(plan_with(2, 6, 9), "forecast")
    error = torch.tensor([3.0, 2.0, 0.0])
    effects = {
        (2, 1): [-3.0, 0.0, 0.0],
        (6, 5): [0.0, -1.5, 0.0],
        (9, 10): [3.0, 0.0, 0.0],
        (6, 7): [0, -1, 0],
    }
    rest = [[0.0, 0.0, 9.0]] * len(refiner.moves)
    table = [torch.tensor(effects.get(move, other)) for move, other in zip(refiner.moves, rest, strict=True)]
    stacked = torch.stack([error, *table]).double()
    refiner.gram_MM = stacked @ stacked.T
    assert refiner.chosen() == [(2, 1), (6, 5)]
    refiner.gram_MM[0] = refiner.gram_MM[:, 0] = 0
    assert refiner.chosen() == [], "nothing lowers an error of 0"


def test_a_round_finds_a_nearer_plan_with_runs_of_reuse(sampler) -> None:
    """From a start that is as bad as can be, one round of single moves comes nearer on other images."""
    backend, judged = SamplerBackend(sampler), rows(sampler, 100, 16)
    full = backend.images(judged)

    def error(plan) -> float:
        change = backend.images(judged, plan, "forecast") - full
        return float(change.square().flatten(1).mean(1).log10().mean())

    start = max((plan_with(*steps) for steps in combinations(range(STEPS - 1), 3)), key=error)
    refiner = PlanRefiner(start, "forecast")
    refiner.measure(backend, rows(sampler, 0, 8).split(3), on_one_worker)
    refiner.try_moves(backend, [rows(sampler, 8, 8)], on_one_worker)
    assert refiner.best != start and refiner.gain_db > 0
    assert error(refiner.best) < error(start)
    assert refiner.best.cur == start.cur


def test_a_run_refines_its_start_and_resumes_bit_for_bit(sampler) -> None:
    def go_on(run: RouterTrainer, until: int) -> list[dict[str, float]]:
        spec, size = SampleSpec.of(sampler.model, 0), REFINED.batch_size
        found = []
        while run.trajectory < until:
            indices = Shard(size).indices(np.arange(size), run.trajectory)
            found.append(run.train_one(spec.to_batch(make_samples(indices, spec), "cpu")))
        return [without_times(each) for each in found]

    whole = RouterTrainer(sampler, REFINED, seed=0)
    expected = go_on(whole, REFINED.all_trajectories)
    assert "refine.gain_db" in expected[3] and "refine.gain_db" in expected[7]
    assert whole.context.starts.keys() == {"start", "refined"}
    refined = whole.context.target.plan_of(whole.context.starts["refined"])
    even = even_plan(STEPS, sampler.model.macs(), 3.0)
    assert refined.ideal_speedup(sampler.model.macs()) == pytest.approx(
        even.ideal_speedup(sampler.model.macs())
    )
    run, found = RouterTrainer(sampler, REFINED, seed=0), []
    for k in range(REFINED.all_trajectories):
        state = run.state()
        run = RouterTrainer(sampler, REFINED, seed=0)
        run.load_state(state)
        found += go_on(run, k + 1)
    assert found == expected
    assert torch.equal(run.router.logits(), whole.router.logits())


def test_a_start_is_measured_once_and_only_where_no_run_is_needed(sampler) -> None:
    """The first target needs runs, so that the second one measures the start, and the third shares it."""
    config = replace(
        REFINED, initial="measured", start_trajectories=1, refine_rounds=1, targets=(1.5, 1.3), batch_size=2
    )
    run = MultiTargetTrainer(sampler, config, seed=0)
    names = [phase.name for phase in all_phase_budgets(config, STEPS)]
    own = ["router", "choice"]
    assert names == ["refine", *own, "start", *own, *own], "a measured start is not refined"
    count = len(list(trained(run, SampleSpec.of(sampler.model, 0), Shard(2))))
    assert count == config.all_trajectories == run.trajectory == 4 + 3 * (2 + 1) + 1
    again = MultiTargetTrainer(sampler, config, seed=0)
    again.load_state(run.state())
    assert again.trajectory == count
    for ours, theirs in zip(again.trainers, run.trainers, strict=True):
        assert ours.plan == theirs.plan
    assert run.trainers[0].phases[0].name == "refine", "3x measures no start"


def test_only_starts_of_steps_are_refined() -> None:
    assert TrainingConfig(refine_rounds=3).all_trajectories == TrainingConfig().all_trajectories
    even = TrainingConfig(refine_rounds=3, initial="even", target_speedup=1.5)
    assert even.all_trajectories == 3 * 4 + even.trajectories
