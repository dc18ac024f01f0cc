"""Published methods as baselines: their forecasts and schedules against their equations."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from harmonica.core.cache import BranchCache
from harmonica.core.plan import Plan
from harmonica.core.plan_builders import even_steps, steps_for, stepwise_plan
from harmonica.core.sampling import sample
from harmonica.core.trajectory import planned_step
from harmonica.data.batch import Batch
from harmonica.models.base import Macs
from harmonica.samplers import Ddim, SamplerConfig
from harmonica.training.plans.fitted_weights import linear_weights
from pipelines.compare.baselines.budcache import budcache
from pipelines.compare.baselines.foca import calibrated, foca
from pipelines.compare.baselines.forecast_tables import difference_weights, with_forecasts
from pipelines.compare.baselines.hicache import hermite, hicache, scaled_hermite
from pipelines.compare.baselines.l2p import l2p
from pipelines.compare.baselines.magcache import magcache, magnitude_ratios, reused_steps
from pipelines.compare.baselines.schedules import (
    interval_plan,
    output_changes,
    threshold_plan,
    thresholded_steps,
)
from pipelines.compare.baselines.spectrum import blended, regression, spectrum
from pipelines.compare.baselines.taylorseer import divided_differences, taylorseer
from pipelines.compare.published import interval_name, interval_variant, own_intervals

PLAN = interval_plan(20, 2, 3)


def forecast(plan: Plan, values: list[float], step: int) -> float:
    """What a cache makes at `step` of values computed where the plan says so; values[i] is step i's."""
    cache = BranchCache(plan.num_branches, "forecast", plan.forecast)
    for i in reversed(range(step + 1, plan.num_steps)):
        if plan.compute[i][0]:
            cache.write(0, i, torch.full((1, 1, 1), values[i], dtype=torch.float64))
    return float(cache.read(0, step))


def test_coefficients_of_values_are_weights_of_differences() -> None:
    coefficients, values = [1.75, -1.5, 0.75], [3.0, 5.0, -2.0]
    w1, w2 = difference_weights(coefficients)
    v1, v2, v3 = values
    assert v1 + w1 * (v1 - v2) + w2 * (v2 - v3) == pytest.approx(np.dot(coefficients, values))


def test_an_interval_computes_the_first_steps_and_then_one_in_n() -> None:
    computed = [i for i in reversed(range(20)) if PLAN.compute[i][0]]
    assert computed == [19, 18, 17, 14, 11, 8, 5, 2]


@pytest.mark.parametrize(("interval", "speed"), [(3, 2.77), (4, 3.57)])
def test_taylorseers_own_schedule_has_the_authors_speed(interval: int, speed: float) -> None:
    """Of DDIM-50 in FLOPs, by their TaylorSeer-DiT.md; all but embedding and head is in branches."""
    plan = interval_plan(50, 2, interval)
    assert plan.ideal_speedup(Macs(branches=(1, 2), rest=0)) == pytest.approx(speed, abs=0.01)


def test_own_intervals_are_those_near_a_speed() -> None:
    macs = Macs(branches=(30, 60) * 6, rest=12)
    assert own_intervals(50, macs, [1.2]) == []
    assert own_intervals(50, macs, [1.2, 1.8, 2.0, 3.0]) == [(2, 1), (2, 2), (3, 1), (3, 2)]
    variant = interval_variant(SamplerConfig(num_inference_steps=20), macs, 3, 2)
    assert variant.name == interval_name(3, 2) == "TaylorSeer, interval 3, order 2"
    assert variant.plan == taylorseer(interval_plan(20, 12, 3), 2) and variant.reuse == "forecast"


def test_taylorseer_of_first_order_is_the_linear_forecast() -> None:
    table = torch.tensor(taylorseer(PLAN, 1).forecast)
    torch.testing.assert_close(table.double(), linear_weights(PLAN, 1), rtol=1e-6, atol=1e-7)


def test_taylorseer_of_second_order_is_its_equation() -> None:
    """`F + D1 x + D2 x^2 / 2`, with D1 and D2 of the last three values, 3 steps apart."""
    values = [math.sin(0.3 * i) for i in range(20)]
    f0, f1, f2 = values[5], values[8], values[11]
    first, second = (f0 - f1) / -3, ((f0 - f1) / -3 - (f1 - f2) / -3) / -3
    for x in (-1, -2):
        expected = f0 + first * x + second * x**2 / 2
        assert forecast(taylorseer(PLAN, 2), values, 5 + x) == pytest.approx(expected, rel=1e-6)


def test_a_derivative_is_the_change_over_the_last_distance_whatever_the_one_before_was() -> None:
    value, first, second = divided_differences([4, 6, 11])
    assert value == [1, 0, 0] and first == [-1 / 2, 1 / 2, 0]
    assert second == pytest.approx([1 / 4, -1 / 4 - 1 / 10, 1 / 10])


def test_hermite_polynomials_are_numpys() -> None:
    for i in range(5):
        assert hermite(i, 0.7) == pytest.approx(np.polynomial.hermite.hermval(0.7, [0] * i + [1]))


def test_hicache_scales_argument_and_result() -> None:
    assert scaled_hermite(2, -3, 0.5) == pytest.approx(0.25 * (4 * 1.5**2 - 2) / 2)
    linear = hicache(PLAN, 1, scale=0.5**0.5).forecast
    torch.testing.assert_close(torch.tensor(linear), torch.tensor(taylorseer(PLAN, 1).forecast))


def test_spectrum_predicts_a_constant_always_and_a_polynomial_without_ridge() -> None:
    assert forecast(spectrum(PLAN), [2.5] * 20, 3) == pytest.approx(2.5)
    computed = [5, 8, 11, 14, 17]
    found = regression(3, computed, num_steps=20, degree=3, ridge=1e-9)
    polynomial = lambda i: 1 + 0.2 * i - 0.03 * i**2 + 0.001 * i**3  # noqa: E731
    assert np.dot(found, [polynomial(i) for i in computed]) == pytest.approx(polynomial(3), rel=1e-5)
    assert sum(found) == pytest.approx(1)
    half = blended(3, computed, num_steps=20, degree=3, ridge=1e-9, blend=0.5)
    line = np.array([1 + 2 / 3, -2 / 3, 0, 0, 0])  # two steps on, from values three apart
    assert half == pytest.approx((np.array(found) + line) / 2)


def by_foca(values: list[float], plan: Plan) -> list[float]:
    """Equations 7 and 8 of FoCa, step by step: each step's value, computed or forecast, step T-1 first."""
    found: list[float] = []
    anchors: list[int] = []
    for i in reversed(range(plan.num_steps)):
        if plan.compute[i][0]:
            anchors.append(i)
            found.append(values[i])
            continue
        last, before = anchors[-1], anchors[-2]
        reliable = (values[last] - values[before]) / (before - last)
        now, earlier = found[-1], found[-2]
        predicted = 4 / 3 * now - 1 / 3 * earlier + 2 / 3 * (now - earlier)
        found.append(now + 1 / 2 * (reliable + (predicted - now)))
    return found


@pytest.mark.parametrize("interval", [2, 3, 5])
def test_foca_is_its_equations(interval: int) -> None:
    plan, values = interval_plan(20, 2, interval), [math.sin(0.3 * i) for i in range(20)]
    expected = by_foca(values, plan)
    made = foca(plan, values=20)
    for i in range(17):
        if not plan.compute[i][0]:
            assert forecast(made, values, i) == pytest.approx(expected[19 - i], rel=1e-5, abs=1e-6)


def test_foca_continues_a_line_whatever_it_keeps() -> None:
    line = [3.0 - 0.5 * i for i in range(20)]
    for values in (2, 3, 6):
        assert forecast(foca(PLAN, values), line, 3) == pytest.approx(line[3])
        assert forecast(foca(PLAN, values), line, 0) == pytest.approx(line[0])
    assert sum(calibrated(2, [5, 6, 9, 13, 15])) == pytest.approx(1)


def test_foca_has_the_numbers_of_cache_dits_test() -> None:
    """Its `test_foca_state_bdf2_quadratic`: x^2 computed at 0 and 1 is forecast as 2 and 3."""
    newest_first = [1.0, 0.0]
    assert [np.dot(calibrated(1 - x, [0, 1]), newest_first) for x in (2, 3)] == pytest.approx([2, 3])


def test_a_longer_memory_than_there_is_changes_nothing() -> None:
    plan = with_forecasts(PLAN, 5, lambda step, computed: [2.0, -1.0])
    assert forecast(plan, list(range(20)), 4) == pytest.approx(2 * 5 - 8)


def test_l2p_is_least_squares_on_values_of_full_trajectories(
    tiny_sampler: Ddim, batch: tuple[Tensor, Tensor]
) -> None:
    plan = stepwise_plan(6, len(tiny_sampler.model.branches), [1, 3])
    fitted = l2p(plan, tiny_sampler, [Batch(*batch)], order=1)

    values: dict[tuple[int, int], Tensor] = {}

    class Seen(BranchCache):
        def write(self, branch: int, step: int, value: Tensor) -> None:
            values[branch, step] = value.flatten()
            super().write(branch, step, value)

    state, cache = Batch(*batch).start(tiny_sampler), Seen(plan.num_branches)
    for i in reversed(range(6)):
        state, _ = planned_step(tiny_sampler, i, state, (True,) * plan.num_branches, cache)
    assert fitted.forecast is not None
    for branch in range(plan.num_branches):
        difference = values[branch, 4] - values[branch, 5]
        wanted = values[branch, 3] - values[branch, 4]
        best = float(difference @ wanted / (difference @ difference))
        # The ridge is a part in a thousand.
        assert fitted.forecast[3][branch][0] == pytest.approx(best, rel=2e-3)
    assert fitted.compute == plan.compute


def test_a_threshold_is_passed_by_what_adds_up() -> None:
    changes = [0.0, 0.1, 0.1, 0.3, 0.1, 0.1, 0.1]
    assert thresholded_steps(changes, 0.25, longest=4) == [5, 4, 2, 1]
    assert thresholded_steps(changes, 0.25, longest=1) == [5, 2, 0]


def test_magcache_adds_up_what_the_product_of_ratios_is_from_one() -> None:
    ratios = [1.0, 0.5, 1.1, 1.1, 1.1, 0.9, 1.0, 1.0, 1.0, 1.0]
    # The first two of ten are computed; then 0.1, 0.1 + 0.21, which is too much; then 0.1 and 0.01 each.
    assert reused_steps(ratios, 0.25, 9) == [7, 5, 4, 3, 2, 1, 0]
    assert reused_steps(ratios, 0.25, 1) == [7, 5, 3, 1]


def test_magcache_reaches_a_speed_with_the_shortest_runs(
    tiny_sampler: Ddim, batch: tuple[Tensor, Tensor]
) -> None:
    macs = tiny_sampler.model.macs()
    plans = [magcache(tiny_sampler, [Batch(*batch)], speedup) for speedup in (1.2, 9.0)]
    slow, fast = ([i for i, row in enumerate(plan.compute) if not any(row)] for plan in plans)
    assert plans[0].ideal_speedup(macs) >= 0.985 * 1.2 and min(np.diff(slow), default=2) > 1
    assert len(fast) > len(slow) and max(fast) < 6 - 1, "the first fifth of six steps is one"


def test_the_smallest_threshold_that_is_fast_enough_is_taken() -> None:
    macs = Macs(branches=(30, 60) * 6, rest=12)
    changes = [0.0, *np.random.default_rng(0).uniform(0.05, 0.3, 19)]
    count, _ = steps_for(20, macs, 2.0)
    reused = sum(not row[0] for row in threshold_plan(changes, macs, 2.0).compute)
    assert count <= reused <= count + 2


def test_changes_are_those_of_neighbouring_outputs(tiny_sampler: Ddim, batch: tuple[Tensor, Tensor]) -> None:
    for measured in (output_changes, magnitude_ratios):
        one, two = measured(tiny_sampler, [Batch(*batch)]), measured(tiny_sampler, [Batch(*batch)] * 2)
        assert one == pytest.approx(two) and len(one) == 6
        assert one[0] == pytest.approx({output_changes: 0, magnitude_ratios: 1}[measured])
        assert all(change > 0 for change in one[1:])


def test_budcache_is_as_near_as_even_steps_or_nearer(
    tiny_sampler: Ddim, batch: tuple[Tensor, Tensor]
) -> None:
    macs = tiny_sampler.model.macs()
    speedup = 6 * macs.full / (4 * macs.full + 2 * macs.rest)
    found = [budcache(tiny_sampler, [Batch(*batch)], speedup, "forecast", trials=12) for _ in range(2)]
    assert found[0] == found[1] and sum(not row[0] for row in found[0].compute) == 2
    even = stepwise_plan(6, len(macs.branches), even_steps(6, 2))
    full = sample(tiny_sampler, *batch)
    errors = [
        (sample(tiny_sampler, *batch, plan, reuse="forecast") - full).square().mean()
        for plan in (found[0], even)
    ]
    assert errors[0] <= errors[1]
