"""`ExchangedPlans`: several routers' plans for one pipeline, each as `harmonica.apply` would put it on."""

import dataclasses

import pytest
import torch
from tiny_recorded_pipelines import STEPS, make_case

import harmonica
from harmonica.core.plan import Plan
from harmonica.integrations.exchanged_plans import ExchangedPlans
from harmonica.integrations.recorded.compiled_units import compile_blocks
from harmonica.integrations.recorded.kinds import BLOCKS
from harmonica.integrations.recorded.unit_calls import UnitCall
from harmonica.integrations.recorded.view import RecordedTransformer
from tests.integrations.test_pipeline_training import ALL_STEPS as STEPS_DRAWN
from tests.integrations.test_pipeline_training import drawn_by, prompts_of


@pytest.mark.parametrize("kind", ["flux", "flux guided", "krea2", "wan 2.2"])
def test_plans_take_turns(kind):
    case = make_case(kind)
    half = case.artifact()
    rows = [[True] * case.branches if i in (0, STEPS - 1) else [False] * case.branches for i in range(STEPS)]
    steps = case.artifact(Plan(tuple(map(tuple, rows))))
    full, expected = case.run(), {}
    for name, artifact in {"half": half, "steps": steps}.items():
        harmonica.apply(case.pipe, artifact)
        expected[name] = case.run()
        harmonica.remove(case.pipe)
    attributes = dict(vars(case.pipe.transformer))
    plans = ExchangedPlans(case.pipe)
    made = {"half": plans.make(half), "steps": plans.make(steps), "full": None}
    for name in ("half", "full", "steps", "half", "full"):
        with plans.under(made[name]):
            assert torch.equal(case.run(), expected.get(name, full)), name
    assert not torch.equal(expected["half"], expected["steps"])
    assert vars(case.pipe.transformer) == attributes


@pytest.mark.parametrize("is_compiled", [False, True])
def test_plans_of_other_branches_take_turns(is_compiled, no_codegen):
    case = make_case("flux")
    prompts, call = prompts_of(case)
    kinds = {"blocks": (BLOCKS,), "all": ("attn", "mlp", "single"), "some": ("attn", "single")}
    made, expected = {}, {"full": drawn_by(case)}
    for name, cacheable in kinds.items():
        even = harmonica.EvenSteps(speedup=1.2, cacheable=cacheable)
        made[name] = harmonica.train_pipeline(
            case.pipe, prompts, even, call=call | {"num_inference_steps": STEPS_DRAWN}
        )
        harmonica.apply(case.pipe, made[name])
        expected[name] = drawn_by(case)
        harmonica.remove(case.pipe)
    if is_compiled:
        compile_blocks(case.pipe.transformer)
    plans = ExchangedPlans(case.pipe)
    put = {name: plans.make(artifact) for name, artifact in made.items()} | {"full": None}
    for name in ("all", "some", "blocks", "full", "all", "blocks", "some", "full"):
        with plans.under(put[name]):
            torch.testing.assert_close(drawn_by(case), expected[name], msg=name)
    for calls in (put["some"], put["all"], put["blocks"]):
        calls[0].close()
    slots = ("forward", "_compiled_call_impl")
    assert not any(
        isinstance(vars(each).get(slot), UnitCall)
        for each in case.pipe.transformer.modules()
        for slot in slots
    )
    torch.testing.assert_close(drawn_by(case), expected["full"])


def test_what_is_recorded_is_shared(monkeypatch):
    case, recorded = make_case("flux"), []
    record = RecordedTransformer.record

    def counting(self, *args, **kwargs):
        recorded.append(self)
        return record(self, *args, **kwargs)

    monkeypatch.setattr(RecordedTransformer, "record", counting)
    plans = ExchangedPlans(case.pipe)
    for reuse in ("hold", "forecast"):
        with plans.under(plans.make(case.artifact(reuse=reuse))):
            case.run()
    assert len(recorded) == 1


def test_branches_are_checked_for_each_plan():
    case = make_case("flux")
    plans, artifact = ExchangedPlans(case.pipe), case.artifact()
    with plans.under(plans.make(artifact)):
        case.run()
    other = dict(artifact.model, branches=artifact.model["branches"][:-1])
    with (
        plans.under(plans.make(dataclasses.replace(artifact, model=other))),
        pytest.raises(ValueError, match="they differ in"),
    ):
        case.run()


def test_a_call_that_fails_leaves_nothing():
    case = make_case("flux")
    plans = ExchangedPlans(case.pipe)
    plan, expected = plans.make(case.artifact()), []
    with plans.under(plan):
        expected.append(case.run())

    def fail(pipe, i, t, tensors):
        raise InterruptedError

    with pytest.raises(InterruptedError), plans.under(plan):
        case.run(callback_on_step_end=fail)
    with plans.under(plan):
        assert torch.equal(case.run(), expected[0])


def test_routers_of_others_are_refused():
    case = make_case("flux")
    plans, artifact = ExchangedPlans(case.pipe), case.artifact()
    with pytest.raises(ValueError, match=r"model\.weights is .* and the router was made for 0000"):
        plans.make(dataclasses.replace(artifact, model={**artifact.model, "weights": "0000"}))
    with pytest.raises(ValueError, match="FluxTransformer2DModel and the router was made for a SD3"):
        plans.make(make_case("sd3").artifact())
    with pytest.raises(ValueError, match="was made for a DiT outside of any pipeline"):
        plans.make(dataclasses.replace(artifact, model={"architecture": "DiT"}))
    harmonica.apply(case.pipe, artifact)
    with pytest.raises(ValueError, match=r"transformer\.forward is not the class's own"):
        ExchangedPlans(case.pipe)
