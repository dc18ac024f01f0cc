"""Values added up ahead of the steps that reuse them: the same images, and what they take of memory."""

from typing import Any

import pytest
import tiny_pixart
import tiny_sana
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick, reuses, trajectories
from tolerances import CLOSE
from torch import Tensor

from harmonica.core.accumulation import AccumulatedSums, AccumulationPlan, kept_bytes
from harmonica.core.cache import cache_bytes
from harmonica.core.plan import Plan, forecast_of
from harmonica.core.sampling import sample
from harmonica.core.trajectory import accumulated_step
from harmonica.models.base import BranchedTransformer
from harmonica.samplers import Sampler, SamplerConfig, make_sampler

BRANCHES = 6


def even_plan(num_steps: int, num_branches: int = BRANCHES, every: int = 2) -> Plan:
    """All of every so manieth step computed, the last one too."""
    rows = [((num_steps - 1 - i) % every == 0,) * num_branches for i in range(num_steps)]
    return Plan(tuple(rows))


def ddim(model: BranchedTransformer, num_steps: int, guidance: float = 1.5) -> Sampler:
    return make_sampler(model, SamplerConfig(num_inference_steps=num_steps, guidance_scale=guidance))


@pytest.fixture
def rows_of_dit() -> tuple[Tensor, Tensor]:
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    return noise, torch.tensor([1, 5, 10])


@quick
@given(trajectories(), reuses, st.integers(0, 3))
def test_images_are_those_of_kept_values(run, reuse, order):
    plan = run.plan
    if order and reuse == "forecast":
        generator = torch.Generator().manual_seed(order)
        weights = torch.randn(plan.num_steps, plan.num_branches, order, generator=generator)
        plan = Plan(plan.compute, forecast_of(weights.double()))
    sampler, batch = ddim(run.model, plan.num_steps), (run.x[0], run.labels)
    kept = sample(sampler, *batch, plan, reuse=reuse, accumulate=False)
    torch.testing.assert_close(sample(sampler, *batch, plan, reuse=reuse, accumulate=True), kept, **CLOSE)


def random_plan(num_steps: int, num_branches: int) -> Plan:
    """Half of the entries, in runs of all lengths."""
    compute = torch.rand(num_steps, num_branches, generator=torch.Generator().manual_seed(4)) > 0.5
    compute[-1] = True
    return Plan(tuple(map(tuple, compute.tolist())))


@pytest.mark.parametrize("reuse", ["hold", "forecast"])
@pytest.mark.parametrize("kinds", [(), ("attn",), ("attn", "cross", "mlp")])
@pytest.mark.parametrize("kind", ["alpha", "sigma", "sana"])
def test_what_always_runs_between_branches_still_does(kind, kinds, reuse):
    if kind == "sana":
        model, batch = tiny_sana.make_sana("1.5", *kinds), tiny_sana.make_batch("1.5")
        sampler = make_sampler(model, tiny_sana.config(num_inference_steps=6, guidance_scale=3.0))
    else:
        model, batch = tiny_pixart.make_pixart(kind, *kinds), tiny_pixart.make_batch(kind)
        sampler = ddim(model, 6, 3.0)
    count = len(model.branches)
    for plan in (random_plan(6, count), even_plan(6, count), even_plan(6, count, every=3)):
        kept = sample(sampler, *batch, plan, reuse=reuse, accumulate=False)
        assert not torch.allclose(kept, sample(sampler, *batch)), "the plan reuses something"
        torch.testing.assert_close(sample(sampler, *batch, plan, reuse=reuse, accumulate=True), kept, **CLOSE)


def bytes_on_the_way(sampler: Sampler, batch: tuple[Any, Any], plan: Plan, reuse: Any) -> list[int]:
    """Of the sums behind each step."""
    ahead = AccumulationPlan.of(plan, reuse, sampler.model)
    state = sampler.start(*batch)
    sums, seen = AccumulatedSums(ahead, state.conditions_T), []
    for i in reversed(range(plan.num_steps)):
        state, _ = accumulated_step(sampler, i, state, sums)
        seen.append(sums.nbytes)
    return seen


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize(("reuse", "sums"), [("hold", 1), ("forecast", 2)])
def test_a_plan_of_whole_steps_keeps_a_sum_for_each_step_ahead(tiny_dit, rows_of_dit, reuse, sums, guidance):
    sampler, plan, is_guided = ddim(tiny_dit, 10, guidance), even_plan(10), guidance != 1
    seen = bytes_on_the_way(sampler, rows_of_dit, plan, reuse)
    said = kept_bytes(tiny_dit, plan, reuse, is_guided=is_guided)
    assert said == sums * cache_bytes(tiny_dit, "hold", is_guided=is_guided) // BRANCHES
    assert max(seen) == 3 * said
    assert seen[-1] == 0, "nothing is left"


def test_single_entries_are_kept_as_values(tiny_dit):
    plan = random_plan(10, BRANCHES)
    values = cache_bytes(tiny_dit, "hold", is_guided=True)
    assert kept_bytes(tiny_dit, plan, "hold", is_guided=True) == values
    assert kept_bytes(tiny_dit, Plan.full(4, BRANCHES), "forecast", is_guided=True) == 0


def test_it_is_done_where_it_saves_memory(tiny_dit, rows_of_dit, monkeypatch):
    passes = []
    original = AccumulatedSums.planned_pass
    monkeypatch.setattr(AccumulatedSums, "planned_pass", lambda *a: passes.append(a[-1]) or original(*a))
    sampler = ddim(tiny_dit, 4)
    sample(sampler, *rows_of_dit, even_plan(4))
    assert passes == [3, 2, 1, 0]
    sample(sampler, *rows_of_dit, random_plan(4, BRANCHES))
    sample(sampler, *rows_of_dit, even_plan(4), accumulate=False)
    sample(sampler, *rows_of_dit)
    assert len(passes) == 4


@pytest.mark.parametrize("images", [1, 16, 40])
def test_looking_ahead_makes_no_conditioning_twice(tiny_dit, monkeypatch, images):
    made: list[float] = []
    original = tiny_dit.conditionings
    monkeypatch.setattr(
        tiny_dit, "conditionings", lambda labels, steps: made.extend(steps) or original(labels, steps)
    )
    noise, labels = torch.randn(images, 4, 8, 8).double(), torch.arange(images) % 10
    sampler = ddim(tiny_dit, 12)
    for every in (2, 6):
        made.clear()
        sample(sampler, noise, labels, even_plan(12, every=every), reuse="forecast", accumulate=True)
        assert sorted(made) == sorted(sampler.timesteps)


def test_rows_do_not_know_of_each_other(tiny_dit, rows_of_dit):
    sampler, (noise, labels) = ddim(tiny_dit, 8), rows_of_dit
    together = sample(sampler, noise, labels, even_plan(8), reuse="forecast", accumulate=True)
    alone = [
        sample(sampler, noise[n : n + 1], labels[n : n + 1], even_plan(8), reuse="forecast", accumulate=True)
        for n in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)
