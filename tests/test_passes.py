"""The three passes agree where they should, and a cache is what its trajectory left in it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from harmonica.cache import BranchCache
from harmonica.passes import planned_pass, soft_pass
from harmonica.plan import Plan
from harmonica.sampling import sample

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_all_compute_plan_is_bit_identical_to_the_full_pass(tiny_dit, batch: Batch, dtype):
    model, noise, labels = tiny_dit.to(dtype), batch[0].to(dtype), batch[1]
    t = torch.full_like(labels, 300)
    hidden, conditioning = model.embed(noise, t, labels)
    planned = planned_pass(model, hidden, conditioning, ALL, BranchCache(6), 3)
    assert torch.equal(planned, model(noise, t, labels))


def test_an_all_compute_plan_samples_bit_identical_images(tiny_sampler, batch: Batch):
    full = sample(tiny_sampler, *batch)
    assert torch.equal(sample(tiny_sampler, *batch, Plan.full(6, 6)), full)
    assert not torch.allclose(sample(tiny_sampler, *batch, half_plan()), full, rtol=0.01)


def test_soft_at_one_is_the_full_pass(tiny_dit, embedded: Embedded, filled):
    full = planned_pass(tiny_dit, *embedded[1], ALL, BranchCache(6), 4)
    ones = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(soft_pass(tiny_dit, *embedded[1], ones, ALL, filled, 4), full)


def test_soft_at_zero_is_the_planned_pass_that_reuses_everything(tiny_dit, embedded: Embedded, filled):
    reused = planned_pass(tiny_dit, *embedded[1], (False,) * 6, filled.copy(), 4)
    zeros = torch.zeros(6, dtype=torch.float64)
    soft = soft_pass(tiny_dit, *embedded[1], zeros, (False,) * 6, filled, 4)
    torch.testing.assert_close(soft, reused)


def test_a_planned_pass_computes_what_the_plan_says_and_nothing_else(tiny_sampler, batch: Batch, computed):
    plan = half_plan()
    sample(tiny_sampler, *batch, plan)
    expected = [b for row in reversed(plan.compute) for b in range(6) if row[b]]
    assert computed == expected


def test_a_reused_branch_merges_the_held_value(tiny_dit, embedded: Embedded, filled):
    held = [filled.read(b, 4).clone() for b in range(6)]
    hidden, conditioning = embedded[1]
    output = planned_pass(tiny_dit, hidden, conditioning, ROW, filled, 4)
    for b, branch in enumerate(tiny_dit.branches):
        y = branch.compute(hidden, conditioning) if ROW[b] else held[b]
        torch.testing.assert_close(filled.read(b, 3), y)
        gate = conditioning.blocks[b // 2][2 if b % 2 == 0 else 5]
        hidden = hidden + gate[:, None] * y
    torch.testing.assert_close(output, tiny_dit.head(hidden, conditioning))


def test_a_soft_pass_keeps_the_mixed_value_where_it_refreshes(tiny_dit, embedded: Embedded, filled):
    held = [filled.read(b, 4).clone() for b in range(6)]
    scores = torch.tensor([0.05, 0.3, 0.9, 0.0, 0.02, 0.5], dtype=torch.float64, requires_grad=True)
    hidden, conditioning = embedded[1]
    soft_pass(tiny_dit, hidden, conditioning, scores, ROW, filled, 4)
    for b, branch in enumerate(tiny_dit.branches):
        y = scores[b] * branch.compute(hidden, conditioning) + (1 - scores[b]) * held[b]
        kept = filled.read(b, 3)
        torch.testing.assert_close(kept, y.detach() if ROW[b] else held[b])
        assert not kept.requires_grad
        hidden = branch.merge(hidden, y, conditioning)


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

    def run_another(i: int, x: Tensor) -> None:
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
