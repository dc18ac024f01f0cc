"""`ExchangedPlans`: several routers' plans for one pipeline, each as `harmonica.apply` would put it on."""

import dataclasses

import pytest
import torch
from tiny_recorded_pipelines import STEPS, make_case

import harmonica
from harmonica.core.plan import Plan
from harmonica.integrations.exchanged_plans import ExchangedPlans
from harmonica.integrations.recorded.view import RecordedTransformer


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
