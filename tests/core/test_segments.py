"""Neighbouring branches that are reused and forecast as one."""

from dataclasses import replace

import pytest
import tiny_pixart
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick, reuses, trajectories
from tolerances import CLOSE
from torch import Tensor

from harmonica.core.accumulation import kept_bytes
from harmonica.core.cache import cache_bytes
from harmonica.core.plan import Plan, correction_of, forecast_of
from harmonica.core.plan_builders import stepwise_plan
from harmonica.core.sampling import sample
from harmonica.core.segments import Segment, segment_starts, units_of, with_segments
from harmonica.models.base import run_all
from harmonica.samplers import Sampler, SamplerConfig, make_sampler

BRANCHES = 6


def ddim(model, num_steps: int) -> Sampler:
    return make_sampler(model, SamplerConfig(num_inference_steps=num_steps, guidance_scale=1.5))


def weighted(plan: Plan, order: int) -> Plan:
    """The plan with random weights, the same for the branches of each of its segments."""
    assert plan.segments is not None
    generator = torch.Generator().manual_seed(order)
    shape = (plan.num_steps, len(plan.segments), order)
    weights_TSK = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([len(each) for each in plan.segment_ranges])
    correction = correction_of(0.1 * torch.randn(plan.num_steps, 1, generator=generator).double())
    return replace(
        plan, forecast=forecast_of(weights_TSK.repeat_interleave(lengths, 1)), correction=correction
    )


@quick
@given(trajectories(), reuses, st.integers(1, 3))
def test_a_segment_adds_a_weighted_sum_of_what_its_branches_added(run, reuse, order):
    """The pass of `planned_pass` written out: deltas of the hidden state, kept and weighted by hand."""
    plan = weighted(with_segments(run.plan, run.model), order)
    sampler, batch = ddim(run.model, plan.num_steps), (run.x[0], run.labels)
    state, outputs = sampler.start(*batch), []
    kept: list[list[Tensor]] = [[] for _ in plan.segment_ranges]
    for i in reversed(range(plan.num_steps)):
        hidden, conditioning = sampler.embed(i, state)
        for s, branches in enumerate(plan.segment_ranges):
            if plan.compute[i][branches.start]:
                after = run_all(run.model.branches[branches.start : branches.stop], hidden, conditioning)
                kept[s] = [after - hidden, *kept[s]]
                hidden = after
                continue
            added, weights = kept[s][0], plan.forecast[i][branches.start] if reuse == "forecast" else ()
            for k, weight in enumerate(weights):
                if k + 1 < len(kept[s]):
                    added = added + weight * (kept[s][k] - kept[s][k + 1])
            hidden = hidden + added
        output = run.model.head(hidden, conditioning)
        outputs = [output, *outputs]
        if reuse == "forecast" and len(outputs) > 1:
            channels = run.model.in_channels
            change = (outputs[0] - outputs[1])[:, :channels]
            output = output.clone()
            output[:, :channels] += plan.correction[i][0] * change
        state = sampler.advance(i, state, sampler.guide(output))
    expected = sampler.finish(state)
    for accumulate in (False, True):
        drawn = sample(sampler, *batch, plan, reuse=reuse, accumulate=accumulate)
        torch.testing.assert_close(drawn, expected, **CLOSE)


def test_segments_are_as_long_as_the_plan_is_alike(tiny_dit):
    assert with_segments(stepwise_plan(4, BRANCHES, [1]), tiny_dit).segments == (0,)
    rows = stepwise_plan(4, BRANCHES, [1]).to_tensor()
    rows[2, 3:] = False
    plan = with_segments(Plan(tuple(map(tuple, rows.tolist()))), tiny_dit)
    assert plan.segments == (0, 3)
    assert plan.by_segment().to_strings() == ["11", "00", "10", "11"]
    units, by_segment = units_of(tiny_dit, plan)
    assert [unit.name for unit in units] == ["attn 0 to attn 1", "mlp 1 to mlp 2"]
    assert by_segment.ideal_speedup(replace(tiny_dit.macs(), branches=tuple(u.macs for u in units))) == (
        pytest.approx(plan.ideal_speedup(tiny_dit.macs()))
    )


def test_a_segment_ends_where_uncached_sub_layers_lie():
    model = tiny_pixart.make_pixart("alpha", "attn", "mlp")
    assert model.branches[0].has_post_branch, "cross-attention follows self-attention"
    starts = segment_starts(model)
    assert starts == tuple(b + 1 for b in range(-1, len(model.branches) - 1) if b < 0 or b % 2 == 0)
    assert segment_starts(tiny_pixart.make_pixart("alpha", "attn", "cross", "mlp")) == (0,)


def test_everything_computed_is_the_full_sampler(tiny_dit):
    plan = weighted(with_segments(Plan.full(4, BRANCHES), tiny_dit), 2)
    plan = replace(plan, correction=None)
    sampler = ddim(tiny_dit, 4)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    batch = noise, torch.tensor([1, 2])
    assert torch.equal(sample(sampler, *batch, plan, reuse="forecast"), sample(sampler, *batch))


@pytest.mark.parametrize("kinds", [("attn", "mlp"), ("attn", "cross", "mlp"), ("mlp",)])
def test_uncached_sub_layers_run_once_after_a_segment(kinds):
    """Whether it is computed or reused: silent branches leave the model's uncached sub-layers alone."""
    model, batch = tiny_pixart.make_pixart("alpha", *kinds), tiny_pixart.make_batch("alpha")
    sampler = ddim(model, 4)
    full = weighted(with_segments(Plan.full(4, len(model.branches)), model), 1)
    drawn = sample(sampler, *batch, replace(full, correction=None), reuse="forecast")
    assert torch.equal(drawn, sample(sampler, *batch))
    plan = with_segments(stepwise_plan(4, len(model.branches), [1]), model)
    held = sample(sampler, *batch, plan)
    ran = []
    for branch in model.branches:
        for each in branch.always:
            each.run = lambda *args, run=each.run: ran.append(1) or run(*args)
    assert torch.equal(sample(sampler, *batch, plan), held)
    assert len(ran) == 4 * sum(len(branch.always) for branch in model.branches)


def test_one_value_is_kept_for_all_branches(tiny_dit):
    plan = weighted(with_segments(stepwise_plan(10, BRANCHES, [1, 3, 5]), tiny_dit), 2)
    kept = kept_bytes(tiny_dit, plan, "forecast", is_guided=True)
    values = cache_bytes(tiny_dit, "forecast", is_guided=True, forecast_order=2)
    assert kept == values // BRANCHES


def test_branches_of_a_segment_that_differ_are_refused():
    plan = stepwise_plan(4, 2, [1])
    with pytest.raises(ValueError, match="segments differ"):
        Plan((*plan.compute[:1], (True, False), *plan.compute[2:]), segments=(0,))
    with pytest.raises(ValueError, match="segments begin at"):
        replace(plan, segments=(1,))
    with pytest.raises(ValueError, match="segments differ"):
        replace(plan, forecast=(((0.1,), (0.2,)),) * 4, segments=(0,))


def test_a_segment_says_which_branches_it_is_of(tiny_dit):
    segment = Segment(tiny_dit.branches)
    assert segment.name == f"{tiny_dit.branches[0].name} to {tiny_dit.branches[-1].name}"
    assert segment.macs == sum(tiny_dit.macs().branches)
