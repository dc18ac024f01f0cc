"""The three passes agree where they should, and a cache is what its trajectory left in it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Trajectory, quick, reuses, trajectories
from tolerances import CLOSE
from torch import Tensor

from harmonica.core.cache import BranchCache, Reuse
from harmonica.core.passes import planned_pass, soft_pass
from harmonica.core.plan import Plan
from harmonica.core.sampling import sample

Batch = tuple[Tensor, Tensor]
"""Noise and labels."""
Embedded = tuple[tuple[Tensor, Any], tuple[Tensor, Any]]
"""Hidden state and conditioning of two successive steps."""
ROW = (False, True, True, False, False, True)
"""Which of the six branches a plan computes."""
ALL = (True,) * 6


@pytest.fixture
def embedded(tiny_dit, batch: Batch):
    """Hidden state and conditioning of two successive steps."""
    noise, labels = batch
    t = torch.full_like(labels, 800)
    return tiny_dit.embed(noise, t, labels), tiny_dit.embed(0.9 * noise, t - 100, labels)


@pytest.fixture
def filled(tiny_dit, embedded: Embedded):
    """A cache as step 5 leaves it, having computed everything."""
    cache = BranchCache(6)
    planned_pass(tiny_dit, *embedded[0], ALL, cache, 5)
    return cache


@pytest.fixture
def computed(tiny_dit, monkeypatch):
    """Indices of the branches computed since, in order."""
    calls: list[int] = []
    for index, branch in enumerate(tiny_dit.branches):

        def compute(hidden, conditioning, index=index, original=branch.compute):
            calls.append(index)
            return original(hidden, conditioning)

        monkeypatch.setattr(branch, "compute", compute)
    return calls


def half_plan() -> Plan:
    rows = torch.rand(6, 6, generator=torch.Generator().manual_seed(2)) > 0.5
    rows[-1] = True
    return Plan(tuple(map(tuple, rows.tolist())))


def after_first_step(run: Trajectory, reuse: Reuse) -> BranchCache:
    """The cache as step T-1 leaves it."""
    cache, first = BranchCache(run.plan.num_branches, reuse), run.steps[0]
    planned_pass(run.model, *run.embed(first), run.plan.compute[first], cache, first)
    return cache


@quick
@given(trajectories(torch.float32) | trajectories(torch.float64), reuses)
def test_an_all_compute_plan_is_bit_identical_to_the_full_pass_all_along(run, reuse):
    row = (True,) * run.plan.num_branches
    cache = BranchCache(len(row), reuse)
    for i in run.steps:
        assert torch.equal(planned_pass(run.model, *run.embed(i), row, cache, i), run.model(*run.inputs(i)))


@quick
@given(trajectories(), reuses)
def test_a_planned_pass_computes_or_looks_up_the_latest_values(run, reuse):
    cache = BranchCache(run.plan.num_branches, reuse)
    slow = run.slow(run.plan.to_tensor().double(), run.plan.to_tensor(), reuse)
    for i, expected in zip(run.steps, slow):
        ours = planned_pass(run.model, *run.embed(i), run.plan.compute[i], cache, i)
        torch.testing.assert_close(ours, expected, **CLOSE)


@quick
@given(trajectories(), reuses, st.integers(0, 99))
def test_a_soft_pass_mixes_and_keeps_the_mixed_value_where_it_refreshes(run, reuse, seed):
    scores = run.plan.to_tensor().double()
    scores[:-1].uniform_(generator=torch.Generator().manual_seed(seed))
    cache = after_first_step(run, reuse)
    for i, expected in list(zip(run.steps, run.slow(scores, run.plan.to_tensor(), reuse)))[1:]:
        row = scores[i].clone().requires_grad_()
        ours = soft_pass(run.model, *run.embed(i), row, run.plan.compute[i], cache, i)
        torch.testing.assert_close(ours.detach(), expected, **CLOSE)
        assert not any(cache.read(b, i - 1).requires_grad for b in range(run.plan.num_branches))


@quick
@given(trajectories(), reuses)
def test_soft_at_one_is_the_full_pass_whatever_is_cached(run, reuse):
    ones = torch.ones(run.plan.num_branches, dtype=torch.float64)
    cache = after_first_step(run, reuse)
    for i in run.steps[1:]:
        soft = soft_pass(run.model, *run.embed(i), ones, run.plan.compute[i], cache, i)
        torch.testing.assert_close(soft, run.model(*run.inputs(i)), **CLOSE)


def test_an_all_compute_plan_samples_bit_identical_images(tiny_sampler, batch: Batch):
    full = sample(tiny_sampler, *batch)
    assert torch.equal(sample(tiny_sampler, *batch, Plan.full(6, 6)), full)
    assert not torch.allclose(sample(tiny_sampler, *batch, half_plan()), full, rtol=0.01)


def test_a_planned_pass_computes_what_the_plan_says_and_nothing_else(tiny_sampler, batch: Batch, computed):
    plan = half_plan()
    sample(tiny_sampler, *batch, plan)
    expected = [b for row in reversed(plan.compute) for b in range(6) if row[b]]
    assert computed == expected


def test_soft_gradient_matches_finite_differences(tiny_dit, embedded: Embedded, filled):
    weight = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def projected(scores_B: Tensor) -> Tensor:
        return (weight * soft_pass(tiny_dit, *embedded[1], scores_B, ROW, filled.copy(), 4)).sum()

    scores = torch.tensor([0.05, 0.3, 0.9, 0.01, 0.02, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(projected, (scores,))
    (gradient,) = torch.autograd.grad(projected(scores), scores)
    assert gradient.abs().min() > 1e-4, "a silent branch has nothing to check"


def test_a_trajectory_is_not_touched_by_another_that_runs_between_its_steps(tiny_sampler, batch: Batch):
    noise, labels = batch
    plan = half_plan()
    alone = sample(tiny_sampler, noise, labels, plan)

    def run_another(i: int, predict: Callable[[], Tensor]) -> None:
        sample(tiny_sampler, noise.flip(0), labels.flip(0), plan)

    assert torch.equal(sample(tiny_sampler, noise, labels, plan, on_step=run_another), alone)


@pytest.mark.parametrize("reuse", ["hold", "forecast"])
def test_a_copied_cache_goes_its_own_way(reuse):
    cache = BranchCache(1, reuse)
    cache.write(0, 9, torch.tensor(9.0))
    twin = cache.copy()
    twin.write(0, 8, torch.tensor(80.0))
    cache.write(0, 8, torch.tensor(8.0))
    assert cache.read(0, 7) == (8 if reuse == "hold" else 7)
    assert twin.read(0, 7) == (80 if reuse == "hold" else 151)


def test_forecast_continues_a_line_exactly():
    def line(step: int) -> Tensor:
        return torch.tensor([3.0 * step + 1, -2.0 * step, 5.0])

    cache = BranchCache(1, "forecast")
    cache.write(0, 19, line(19))
    assert torch.equal(cache.read(0, 18), line(19)), "one value known: it holds"
    cache.write(0, 17, line(17))
    for step in (16, 15, 12):
        assert torch.equal(cache.read(0, step), line(step))
    cache.write(0, 12, torch.zeros(3))
    assert torch.equal(cache.read(0, 7), -line(17)), "it goes by the two latest values"


def test_hold_hands_out_the_latest_value():
    cache = BranchCache(1)
    cache.write(0, 19, torch.tensor(19.0))
    cache.write(0, 17, torch.tensor(17.0))
    assert cache.read(0, 12) == 17
