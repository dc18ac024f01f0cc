"""What the start is learned from: the image's derivatives in the reuse of each step, and their form."""

from collections.abc import Sequence
from functools import partial
from itertools import combinations

import pytest
import torch
from latent_rows import rows
from torch import Tensor

from harmonica.core.cache import BranchCache
from harmonica.core.passes import planned_pass
from harmonica.core.plan import Plan, correction_of
from harmonica.core.plan_builders import stepwise_plan
from harmonica.core.sampling import sample
from harmonica.core.segments import segments_of
from harmonica.data.batch import Batch
from harmonica.execution.values import KeptValues
from harmonica.models.base import Branch, Macs
from harmonica.models.dit.model import DiT
from harmonica.samplers import Sampler, SamplerConfig, make_sampler
from harmonica.training.plans import step_form
from harmonica.training.plans.forecast_sketch import probes_of
from harmonica.training.plans.search import StepSearch
from harmonica.training.plans.step_form import LINEAR, StepForm, size_of_form
from harmonica.training.plans.step_sketch import sketch_steps

STEPS, BRANCHES, PROBES, REACH = 6, 6, 2, 3


@pytest.fixture
def sampler(tiny_dit: DiT) -> Sampler:
    config = SamplerConfig(num_inference_steps=STEPS, guidance_scale=1.5, clip_sample=False)
    return make_sampler(tiny_dit, config)


class Moved(BranchCache):
    """Every value of one step, moved a little towards that of an earlier one."""

    def __init__(self, distance: int, by: float, count: int) -> None:
        super().__init__(count)
        self.distance, self.by, self.values = distance, by, dict[tuple[int, int], Tensor]()

    def write(self, branch: int, step: int, value: Tensor) -> None:
        self.values[branch, step] = value

    def read(self, branch: int, step: int) -> Tensor:
        value = self.values[branch, step]
        return value + self.by * (self.values[branch, step + self.distance] - value)

    def kept(self, branch: int, step: int) -> KeptValues:
        return KeptValues.of([self.read(branch, step)], ())


@torch.no_grad()
def moved_images(
    sampler: Sampler, batch: Batch, moved: int, distance: int, by: float, units: Sequence[Branch]
) -> Tensor:
    """The images where the whole of one step is reused, with a value near its own."""
    state, cache, count = batch.start(sampler), Moved(distance, by, len(units)), len(units)
    for i in reversed(range(STEPS)):
        hidden, conditioning = sampler.embed(i, state)
        step = partial(planned_pass, sampler.model, hidden, conditioning, units=units)
        output = step((True,) * count, cache, i)
        if i == moved:
            output = step((False,) * count, cache, i)
        state = sampler.advance(i, state, sampler.guide(output))
    return sampler.finish(state)


@pytest.mark.parametrize("segments", [False, True])
def test_the_sketch_has_the_derivatives_of_the_images(sampler, segments):
    batch, by = rows(0, 2), 1e-2
    units = segments_of(sampler.model, [0]) if segments else sampler.model.branches
    how = {"reach": REACH, "corrections": 0, "probes": PROBES, "segments": segments}
    sketch_RTD = sketch_steps(sampler, batch, **how)
    assert sketch_RTD.shape == (2 * PROBES, STEPS, REACH)
    for i, distance in ((0, 1), (2, 3), (4, 1)):
        up, down = (moved_images(sampler, batch, i, distance, sign * by, units) for sign in (1, -1))
        change_NX = ((up - down) / (2 * by)).flatten(1)
        for probe in range(PROBES):
            drawn = torch.from_numpy(batch.keys.step_noise(STEPS + probe, (4, 8, 8))).double().flatten(1)
            expected_N = (change_NX * drawn).sum(1) / change_NX.shape[1] ** 0.5
            found_N = sketch_RTD[2 * probe : 2 * probe + 2, i, distance - 1].double()
            # The difference is of second order in `by`.
            torch.testing.assert_close(found_N, expected_N, rtol=1e-3, atol=1e-6 * float(change_NX.norm()))
    assert not sketch_RTD[:, STEPS - 1].any() and not sketch_RTD[:, 4, 1:].any(), "there is no such step"


def test_the_sketch_has_the_derivatives_of_corrections(sampler):
    """Those of a full trajectory, whose branches' derivatives are what they were."""
    batch, small = rows(0, 2), 1e-5
    sketch_RTD = sketch_steps(sampler, batch, reach=REACH, corrections=2, probes=PROBES)
    alone_RTD = sketch_steps(sampler, batch, reach=REACH, corrections=0, probes=PROBES)
    torch.testing.assert_close(sketch_RTD[:, :, :REACH], alone_RTD, rtol=1e-5, atol=1e-9)
    everything = Plan.full(STEPS, BRANCHES).compute
    probes = list(probes_of(torch.zeros_like(batch.noise_NCHW), batch.keys, STEPS, PROBES))
    for i, k in ((0, 0), (2, 1), (4, 0)):
        moved = []
        for sign in (1, -1):
            weights_TJ = torch.zeros(STEPS, 2, dtype=torch.float64)
            weights_TJ[i, k] = sign * small
            plan = Plan(everything, None, correction_of(weights_TJ))
            images = sample(sampler, batch.noise_NCHW, batch.condition_N, plan, reuse="forecast")
            moved.append(images.clone())
        slope_NCHW = (moved[0] - moved[1]) / (2 * small)
        expected_R = torch.cat([(slope_NCHW * probe).flatten(1).sum(1) for probe in probes])
        towards_R = sketch_RTD[:, i, REACH + k - 1] if k else 0  # the newer of the two outputs is its own
        found_R = towards_R - sketch_RTD[:, i, REACH + k]
        torch.testing.assert_close(found_R.double(), expected_R.double(), rtol=1e-3, atol=1e-8)


def random_form(
    order: int, steps: int = 10, num_rows: int = 60, corrections: int = 0
) -> tuple[StepSearch, Tensor]:
    """A form of random derivatives, and the derivatives (R, T, D + J)."""
    search = StepSearch(steps, order, corrections=corrections)
    generator = torch.Generator().manual_seed(3)
    count = search.reach + corrections
    moved_RTD = torch.randn(num_rows, steps, count, generator=generator, dtype=torch.float64)
    moved_RP = moved_RTD.flatten(1)
    search.load_state(moved_RP.T @ moved_RP)
    return search, moved_RTD


def coefficients(steps: set[int], i: int, weights: list[float]) -> dict[int, float]:
    """Of each distance in a forecast of step i: the last value, and weights of the differences."""
    sources = [d for d in range(1, 10 - i) if i + d not in steps]
    found = {sources[0]: 1.0}
    for weight, newer, older in zip(weights, sources, sources[1:], strict=False):
        found[newer] = found.get(newer, 0.0) + weight
        found[older] = found.get(older, 0.0) - weight
    return found


def test_a_cost_is_the_size_of_the_linear_forecasts_change():
    search, moved_RTD = random_form(order=1)
    steps = {1, 2, 5}  # a run
    total_R = torch.zeros(len(moved_RTD), dtype=torch.float64)
    for i, weight in ((1, 2 / 1), (2, 1 / 1), (5, 1 / 1)):  # distance from the last value, over its gap
        for distance, factor in coefficients(steps, i, [weight]).items():
            total_R += factor * moved_RTD[:, i, distance - 1]
    assert search.cost(steps, LINEAR) == pytest.approx(float(total_R.square().sum()), rel=1e-4)


def test_the_weights_are_those_of_least_squares(monkeypatch):
    search, moved_RTD = random_form(order=2)
    monkeypatch.setattr(step_form, "_OF_PLANS", 1e-9)
    search.ridge = 1e-9
    steps = [0, 4, 7]
    plan = search.with_forecast(stepwise_plan(10, 3, steps))
    assert plan.forecast is not None

    def change(weights: Tensor) -> Tensor:
        total_R = torch.zeros(len(moved_RTD), dtype=torch.float64)
        for i, row in zip(steps, weights, strict=True):
            for distance, factor in coefficients(set(steps), i, list(row)).items():
                total_R = total_R + factor * moved_RTD[:, i, distance - 1]
        return total_R

    weights = torch.tensor([plan.forecast[i][0] for i in steps], dtype=torch.float64)
    assert all(plan.forecast[i] == (plan.forecast[i][0],) * 3 for i in steps), "branches share them"
    # Step 7 has two values before it, hence one difference.
    assert weights[2, 1] == 0
    origin_R = change(torch.zeros(3, 2, dtype=torch.float64))
    units = torch.eye(6, dtype=torch.float64).reshape(6, 3, 2)[:5]
    matrix_RQ = torch.stack([change(unit) - origin_R for unit in units], 1)
    expected = torch.linalg.lstsq(matrix_RQ, -origin_R[:, None]).solution.flatten()
    torch.testing.assert_close(weights.flatten()[:5], expected, rtol=1e-5, atol=1e-6)
    assert search.cost(steps) == pytest.approx(float(change(weights).square().sum()), rel=1e-5)


def test_the_correction_is_that_of_least_squares_too(monkeypatch):
    search, moved_RTD = random_form(order=1, corrections=2)
    monkeypatch.setattr(step_form, "_OF_PLANS", 1e-12)
    search.ridge = 1e-12
    plan = search.with_forecast(stepwise_plan(10, 3, [2, 5]))
    assert plan.correction is not None and plan.forecast is not None
    columns = []
    for i in (2, 5):  # the difference between the last values but one and two steps before
        columns.append(moved_RTD[:, i, 0] - moved_RTD[:, i, 1])
    reach, names = search.reach, [(i, k) for i in range(6) for k in range(2)]  # from the first reused step
    for i, k in names:
        towards_R = moved_RTD[:, i, reach + k - 1] if k else 0
        columns.append(towards_R - moved_RTD[:, i, reach + k])
    origin_R = moved_RTD[:, 2, 0] + moved_RTD[:, 5, 0]
    expected = torch.linalg.lstsq(torch.stack(columns, 1), -origin_R[:, None]).solution.flatten()
    found = [plan.forecast[i][0][0] for i in (2, 5)] + [plan.correction[i][k] for i, k in names]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-5, atol=1e-6)
    assert not any(any(row) for row in plan.correction[6:])
    residual_R = origin_R + torch.stack(columns, 1) @ expected
    assert search.cost([2, 5]) == pytest.approx(float(residual_R.square().sum()), rel=1e-5)


def test_a_branch_that_is_reused_elsewhere_has_the_weights_of_its_own_steps():
    search, _ = random_form(order=2)
    rows_ = [[True, True] for _ in range(10)]
    rows_[1], rows_[4] = [False, False], [True, False]
    plan = search.with_forecast(Plan(tuple(map(tuple, rows_))))
    both = search.with_forecast(stepwise_plan(10, 2, [1, 4]))
    alone = search.with_forecast(stepwise_plan(10, 2, [1]))
    assert plan.forecast is not None and both.forecast is not None and alone.forecast is not None
    assert plan.forecast[1] == (alone.forecast[1][0], both.forecast[1][1])
    assert plan.forecast[4] == ((0.0, 0.0), both.forecast[4][1])


@pytest.mark.parametrize("corrections", [0, 1])
def test_a_set_of_no_steps_costs_nothing(corrections):
    search, _ = random_form(2, corrections=corrections)
    assert search.cost([]) == 0
    full = Plan.full(10, 3)
    found = search.with_forecast(full)
    assert found.compute == full.compute and not torch.tensor(found.forecast).any()


@pytest.mark.parametrize("are_all_tried", [True, False])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_search_finds_the_best_set_of_a_small_form(order, are_all_tried, monkeypatch):
    if not are_all_tried:
        monkeypatch.setattr("harmonica.training.plans.search._ALL", 0)
    search, _ = random_form(order)
    best = min(combinations(range(9), 3), key=search.cost)
    assert search.best(3) == list(best)
    fixed = min((steps for steps in combinations(range(9), 3) if best[0] not in steps), key=search.cost)
    assert search.best(3, fixed=[best[0]]) == list(fixed)


def test_the_next_best_sets_come_in_their_order():
    search, _ = random_form(2)
    ranked = sorted(combinations(range(9), 3), key=search.cost)
    assert search.best_sets(3, len(ranked)) == [list(steps) for steps in ranked], "few sets are all tried"
    macs = Macs(branches=(30, 60), rest=12)
    plans = search.plans(macs, stepwise_plan(10, 2, ranked[0]).ideal_speedup(macs), number=4)
    assert plans == [stepwise_plan(10, 2, steps) for steps in ranked[:4]]


def test_the_form_of_a_version_before_is_left_out():
    form = StepForm(10, 2)
    form.load_state(torch.ones(18, 18, dtype=torch.float64))
    assert form.gram_PP.shape == (size_of_form(10, 0),) * 2 and not form.gram_PP.any()
    plan = stepwise_plan(10, 2, [3])
    assert form.with_forecast(plan) == plan, "nothing is known of its forecasts"
