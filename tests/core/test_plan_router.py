"""What a plan costs, and what a router may and may not do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import plans, quick, trajectories
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harmonica.core.cache import BranchCache
from harmonica.core.passes import planned_pass
from harmonica.core.plan import Plan
from harmonica.core.router import FIXED_LOGIT, Router
from harmonica.core.sampling import sample
from harmonica.models.base import Macs

MACS = Macs(branches=(30, 70), rest=20)


def plan_of(*rows: str) -> Plan:
    return Plan(tuple(tuple(entry == "1" for entry in row) for row in rows))


@quick
@given(st.integers(1, 6).flatmap(plans))
def test_cur_is_reused_entries_by_all_entries_row_t_minus_1_included(plan):
    reused = 0
    for row in plan.compute:
        for is_computed in row:
            if not is_computed:
                reused += 1
    assert plan.cur == pytest.approx(reused / (plan.num_steps * plan.num_branches), abs=1e-12)
    assert "".join(plan.to_strings()).count("0") == plan.to_tensor().logical_not().sum() == reused


def test_ideal_speedup_counts_what_is_left():
    # Full: 4 steps of 120. Reused: 30 in step 0, 100 in step 1, 70 in step 2.
    plan = plan_of("01", "00", "10", "11")
    assert plan.macs(MACS) == 480 - 200
    assert plan.ideal_speedup(MACS) == pytest.approx(480 / 280)
    assert Plan.full(4, 2).ideal_speedup(MACS) == 1


def test_macs_of_the_tiny_shape_by_hand(tiny_dit):
    tokens, width = 16, 48
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width  # qkv and projection; scores and values
    mlp = 2 * tokens * width * 4 * width
    assert tiny_dit.macs().branches == (attention, mlp) * 3 == (172032, 294912) * 3
    assert [branch.name for branch in tiny_dit.branches[:3]] == ["attn 0", "mlp 0", "attn 1"]


@quick
@given(trajectories())
def test_macs_of_a_plan_and_of_the_full_model_are_what_torch_counts(run):
    macs, num_rows = run.model.macs(), len(run.labels)
    cache = BranchCache(run.plan.num_branches)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as planned:
        for i in run.steps:
            planned_pass(run.model, *run.embed(i), run.plan.compute[i], cache, i)
    assert planned.get_total_flops() == 2 * num_rows * run.plan.macs(macs)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as full:
        run.model(*run.inputs(0))
    assert full.get_total_flops() == 2 * num_rows * macs.full
    speedup = full.get_total_flops() * len(run.steps) / planned.get_total_flops()
    assert run.plan.ideal_speedup(macs) == pytest.approx(speedup)


def test_the_first_step_always_computes():
    assert Router(4, 6, initial_logit=-5.0).plan(0.1).to_strings() == ["000000"] * 3 + ["111111"]
    low = Router.from_logits(torch.full((4, 6), -5.0))
    assert low.plan(0.1).compute[-1] == (True,) * 6
    assert [row.requires_grad for row in Router(4, 6).rows] == [True, True, True, False]


def test_a_score_of_tau_is_reused():
    scores = torch.tensor([[0.5, 0.6, 0.4], [0.0, 0.0, 0.0]])
    assert Plan.from_scores(scores, 0.5).to_strings() == ["010", "111"]
    assert scores[-1].sum() == 0, "the scores are not the plan's to change"


def test_strings_and_tensor_round_trip():
    plan = plan_of("01", "00", "10", "11")
    assert plan.to_strings() == ["01", "00", "10", "11"]
    assert plan_of(*plan.to_strings()) == plan
    assert Plan(tuple(map(tuple, plan.to_tensor().tolist()))) == plan


@pytest.mark.parametrize(
    ("num_steps", "computes"), [(6, "010101"), (5, "10101"), (2, "01"), (9, "101010101")]
)
def test_an_alternating_router_reuses_every_second_step_from_the_second_on(num_steps, computes):
    router = Router.alternating(num_steps, 3, 2.0)
    assert router.plan(0.5).to_strings() == [entry * 3 for entry in computes]
    assert router.logits()[:-1].abs().eq(2.0).all()
    assert router.logits()[-1].eq(FIXED_LOGIT).all()


def test_clamp_keeps_logits_within_and_the_last_row_fixed():
    router = Router.from_logits(torch.tensor([[-9.0, 0.5, 9.0], [FIXED_LOGIT] * 3]))
    router.clamp_(2.0)
    assert router.logits().tolist() == [[-2.0, 0.5, 2.0], [FIXED_LOGIT] * 3]


def test_from_logits_keeps_values_and_precision():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    router = Router.from_logits(logits)
    assert torch.equal(router.logits(), logits)
    assert torch.equal(router.scores(1), logits[1].sigmoid())
    with torch.no_grad():
        router.rows[0].zero_()
    assert logits[0].ne(0).all(), "the router has its own memory"


def test_bad_plans_say_what_to_give():
    with pytest.raises(ValueError, match=r"plan rows differ in length: give T rows"):
        plan_of("01", "1", "11")
    with pytest.raises(ValueError, match=r"give T rows of one entry a branch"):
        Plan(())
    with pytest.raises(ValueError, match=r"row T-1 reuses a branch"):
        plan_of("11", "10")
    with pytest.raises(ValueError, match=r"scores have shape \(6,\): give a T x B table"):
        Plan.from_scores(torch.ones(6), 0.5)


def test_a_plan_of_another_shape_is_not_sampled_with(tiny_sampler, batch: tuple[Tensor, Tensor]):
    with pytest.raises(ValueError, match=r"plan has 5 steps and num_inference_steps is 6: use the router's"):
        sample(tiny_sampler, *batch, Plan.full(5, 6))
    with pytest.raises(ValueError, match=r"plan has 8 branches and the model 6: use the model"):
        sample(tiny_sampler, *batch, Plan.full(6, 8))


@quick
@given(num_steps=st.integers(2, 30), wanted=st.integers(2, 60), every=st.integers(2, 4))
def test_a_plan_for_another_t_keeps_its_shape_along_the_trajectory(num_steps, wanted, every):
    plan = Plan((*(((i % every == 0), i == 1) for i in range(num_steps - 1)), (True, True)))
    other = plan.at_steps(wanted)
    assert other.num_steps == wanted and all(other.compute[-1]) and other.compute[0] == plan.compute[0]
    assert plan.at_steps(num_steps) == plan
    twice = plan.at_steps(2 * num_steps - 1)
    assert twice.compute[::2] == plan.compute


def test_learned_forecasts_do_not_go_to_another_t():
    plan = Plan(((False,), (True,), (True,)), forecast=(((0.5,),), ((0.0,),), ((0.0,),)))
    assert plan.at_steps(3).forecast is not None and plan.at_steps(5).forecast is None
