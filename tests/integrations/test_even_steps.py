"""`harmonica.EvenSteps`: a plan for any pipeline that needs no training."""

import copy
import dataclasses
import logging
import math
from typing import Any

import pytest
import tiny_attached
import torch
from diffusers.schedulers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from tiny_recorded_pipelines import KINDS, make_case
from torch import Tensor

import harmonica
from harmonica.core.plan_builders import even_plan, with_fixed_correction
from harmonica.integrations.diffusers_pipeline import even_speedup
from harmonica.integrations.recorded.even_steps import is_flow_matching
from harmonica.integrations.recorded.even_trajectory import EvenTrajectory
from harmonica.integrations.recorded.kinds import BLOCKS
from harmonica.models.base import Macs
from tests.integrations.test_block_stack import calls_in_blocks, trainer_of
from tests.integrations.test_pipeline_training import ALL_STEPS as STEPS
from tests.integrations.test_pipeline_training import drawn_by, prompts_of

HALF = harmonica.EvenSteps(speedup=1.5)


def drawn_under(case: Any, plan: Any) -> Tensor:
    harmonica.apply(case.pipe, plan)
    try:
        return drawn_by(case)
    finally:
        harmonica.remove(case.pipe)


@pytest.mark.parametrize("kind", KINDS)
def test_it_draws_what_a_router_of_the_same_plan_draws(kind, tmp_path):
    case = make_case(kind)
    whole = drawn_by(case)
    with trainer_of(case) as trainer:
        macs = trainer.calls.view.macs()
    assert is_flow_matching(case.pipe.scheduler), "as those of all of these pipelines are"
    plan = with_fixed_correction(even_plan(STEPS, macs, HALF.speedup), 0.75)
    assert plan.correction is not None and 0 < plan.cur < 1
    prompts, call = prompts_of(case)
    artifact = harmonica.train_pipeline(case.pipe, prompts, HALF, call=call | {"num_inference_steps": STEPS})
    artifact.save(tmp_path)
    assert artifact.plan.compute == plan.compute and artifact.method == "even steps + linear forecast"
    assert artifact.ideal_speedup == plan.ideal_speedup(macs)
    torch.testing.assert_close(torch.tensor(artifact.plan.correction), torch.tensor(plan.correction))
    found = drawn_under(case, HALF)
    torch.testing.assert_close(found, drawn_under(case, tmp_path))
    assert not torch.allclose(found, whole, rtol=1e-4) and found.isfinite().all()
    assert torch.equal(drawn_by(case), whole), "removal leaves nothing behind"


@pytest.mark.parametrize("kind", ["flux", "flux guided", "wan 2.1"])
def test_the_number_of_steps_may_change_from_call_to_call(kind):
    case = make_case(kind)
    calls = {steps: calls_in_blocks(case, steps) for steps in (4, 9, 6)}
    harmonica.apply(case.pipe, HALF)
    drawn_by(case)  # the first call finds the blocks
    trajectory = case.pipe.transformer._harmonica.trajectory
    assert isinstance(trajectory, EvenTrajectory)
    for steps, full in calls.items():
        computed = calls_in_blocks(case, steps)
        plan = HALF.plan(steps, trajectory.views[0].macs())
        assert computed == full * sum(map(any, plan.compute)) // steps < full


def test_kinds_of_sub_modules_may_be_reused_instead():
    case = make_case("flux")
    one, other = (
        drawn_under(case, harmonica.EvenSteps(speedup=1.5, cacheable=kinds))
        for kinds in ((BLOCKS,), ("attn", "mlp", "single"))
    )
    assert not torch.equal(one, other)


def test_the_share_of_the_correction_is_what_is_given_or_follows_from_the_scheduler():
    macs = Macs((90,), 10)
    even = even_plan(8, macs, 1.5)
    assert dataclasses.replace(HALF, correction=0).plan(8, macs) == even
    assert dataclasses.replace(HALF, correction=1).plan(8, macs) == with_fixed_correction(even, 1)
    assert HALF.plan(8, macs) == with_fixed_correction(even, 0.5)
    assert HALF.plan(8, macs, is_flow_matching=True) == with_fixed_correction(even, 0.75)
    fast = dataclasses.replace(HALF, speedup=2.5)
    flow, other = (fast.plan(28, macs, is_flow_matching=each) for each in (True, False))
    assert flow.cur == other.cur and flow.compute != other.compute, "their longer runs lie elsewhere"


def test_flow_matching_is_told_by_the_scheduler():
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    assert is_flow_matching(FlowMatchEulerDiscreteScheduler())
    assert is_flow_matching(DPMSolverMultistepScheduler(**flow))
    assert not is_flow_matching(DPMSolverMultistepScheduler())
    assert not is_flow_matching(None)


@pytest.mark.parametrize("kind", ["dit", "alpha", "sigma"])
def test_pipelines_of_branch_files_need_none(kind, tmp_path):
    case = tiny_attached.make_case(kind, tmp_path)
    whole = case.run()
    harmonica.apply(case.pipe, HALF)
    assert 0 < tiny_attached.apart(case.run(), whole) < 0.2
    harmonica.remove(case.pipe)
    assert torch.equal(case.run(), whole)


def test_a_copy_of_the_transformer_takes_it_along():
    case = make_case("flux")
    wanted = drawn_under(case, HALF)
    harmonica.apply(case.pipe, HALF)
    case.pipe.transformer = copy.deepcopy(case.pipe.transformer)
    assert torch.equal(drawn_by(case), wanted)


def test_the_log_says_what_a_call_has_and_warns_where_it_has_nothing(caplog):
    case = make_case("flux")
    with caplog.at_level(logging.INFO):
        drawn_under(case, HALF)
        assert drawn_under(case, harmonica.EvenSteps(speedup=1.01)).isfinite().all()
    told = [each for each in caplog.records if "evenly spread steps" in each.message]
    assert [each.levelname for each in told] == ["INFO", "WARNING"]
    assert f"0 of {STEPS} are reused, for 1.00 times less" in told[1].message


def test_a_loop_of_ones_own_says_how_many_steps_it_makes():
    case = make_case("flux")
    transformer, given = case.pipe.transformer, []
    handle = transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    drawn_by(case)
    handle.remove()

    def loop() -> list[Tensor]:
        with torch.no_grad():
            return [transformer(**kwargs)[0] for kwargs in given]

    whole = loop()
    harmonica.apply(transformer, HALF)
    with pytest.raises(ValueError, match=r"no diffusers pipeline runs .* give num_inference_steps"):
        loop()
    harmonica.remove(transformer)
    harmonica.apply(transformer, dataclasses.replace(HALF, num_inference_steps=len(given)))
    for _ in range(2):  # a second trajectory begins anew
        found = loop()
        assert torch.equal(found[0], whole[0]) and not torch.equal(found[-1], whole[-1])


def test_a_pipeline_that_makes_other_steps_than_were_given_is_refused():
    case = make_case("flux")
    harmonica.apply(case.pipe, harmonica.EvenSteps(speedup=1.5, num_inference_steps=STEPS + 1))
    with pytest.raises(ValueError, match=f"is to make {STEPS} steps"):
        drawn_by(case)


def test_an_artifact_is_of_the_steps_that_the_call_makes():
    case = make_case("flux")
    prompts, call = prompts_of(case)
    with pytest.raises(ValueError, match="prompts is empty"):
        harmonica.train_pipeline(case.pipe, [], HALF, call=call)
    given = dataclasses.replace(HALF, num_inference_steps=STEPS + 1)
    with pytest.raises(ValueError, match=f"the pipeline makes {STEPS} steps: leave it out"):
        harmonica.train_pipeline(case.pipe, prompts, given, call=call | {"num_inference_steps": STEPS})
    assert torch.equal(drawn_by(case), drawn_by(make_case("flux"))), "the pipeline is as it was"


def test_a_speed_that_so_few_steps_do_not_reach_has_no_artifact():
    case, fast = make_case("flux"), harmonica.EvenSteps(speedup=3.5)
    prompts, call = prompts_of(case)
    reach = r"speedup is 3.5: 3 steps of this transformer reach 2\.\d+ at most: give at most that, or more"
    with pytest.raises(ValueError, match=reach):
        harmonica.train_pipeline(case.pipe, prompts, fast, call=call | {"num_inference_steps": 3})
    with pytest.raises(ValueError, match=r"1 steps of this transformer reach 1.00 at most: give more steps"):
        fast.plan(1, Macs((90,), 10))


@pytest.mark.parametrize(
    ("field", "value", "cure"),
    [
        ("speedup", 1.0, "above 1"),
        ("speedup", math.nan, "above 1"),
        ("cacheable", ("blocks", "attn"), "blocks alone"),
        ("correction", 1.5, "from 0 to 1"),
        ("num_inference_steps", 1, "2 or more"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(field, value, cure):
    with pytest.raises(ValueError, match=f"{field} is .*{cure}"):
        harmonica.EvenSteps(**{field: value})


def test_the_speed_of_the_last_call_is_told():
    case = make_case("flux")
    with pytest.raises(ValueError, match="has not run under EvenSteps"):
        even_speedup(case.pipe)
    harmonica.apply(case.pipe, HALF)
    with pytest.raises(ValueError, match="has not run under EvenSteps"):
        even_speedup(case.pipe)
    for steps in (6, 9):
        drawn_by(case, steps)
        macs = case.pipe.transformer._harmonica.trajectory.views[0].macs()
        assert even_speedup(case.pipe) == HALF.plan(steps, macs).ideal_speedup(macs) > 1
