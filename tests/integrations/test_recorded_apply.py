"""`harmonica.apply` on pipelines whose transformers have no branch files: its calls and steps."""

import copy
from typing import Any

import pytest
import tiny_attached
import tiny_text
import torch
from tiny_recorded_pipelines import KINDS, STEPS, Case, apart, make_case
from torch import Tensor

import harmonica
from harmonica.core.plan import Plan
from harmonica.integrations.recorded.call_tracker import CallTracker
from harmonica.integrations.recorded.view import RecordedTransformer

TWO_CALLS = ("flux guided", "wan 2.1", "krea2", "qwen")


@pytest.fixture(params=KINDS)
def case(request) -> Case:
    return make_case(request.param)


def test_a_plan_that_computes_everything_changes_no_bit_and_removal_none(case):
    transformer = case.pipe.transformer
    before, attributes = case.run(), dict(vars(transformer))
    harmonica.apply(case.pipe, case.artifact(Plan.full(STEPS, case.branches)))
    assert torch.equal(case.run(), before)
    harmonica.remove(case.pipe)
    assert torch.equal(case.run(), before)
    assert vars(transformer) == attributes
    assert not any("forward" in vars(each) for each in transformer.modules())


@pytest.mark.parametrize("reuse", ["hold", "forecast"])
def test_a_plan_changes_the_latents_a_little_and_two_calls_share_nothing(case, reuse):
    full = [case.run(seed=seed) for seed in (1, 2)]
    found = []
    for seed in (1, 2):
        harmonica.apply(case.pipe, case.artifact(reuse=reuse))
        found.append(case.run(seed=seed))
        harmonica.remove(case.pipe)
    assert all(1e-5 < apart(one, other) < 0.2 for one, other in zip(found, full))
    harmonica.apply(case.pipe, case.artifact(reuse=reuse))
    assert all(torch.equal(case.run(seed=seed), wanted) for seed, wanted in zip((1, 2), found))


def _calls_of(case: Case) -> list[tuple[dict[str, Any], Tensor]]:
    """Arguments and output of each call of the transformer in a run."""
    calls: list[tuple[dict[str, Any], Tensor]] = []

    def keep(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        assert not args
        calls.append((kwargs, output[0]))

    handle = case.pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    case.run()
    handle.remove()
    return calls


@pytest.mark.parametrize("kind", TWO_CALLS)
def test_each_of_two_calls_reuses_what_it_computed_itself(kind):
    case = make_case(kind)
    artifact = case.artifact()
    harmonica.apply(case.pipe, artifact)
    calls = _calls_of(case)
    harmonica.remove(case.pipe)
    assert len(calls) == 2 * STEPS
    view = RecordedTransformer(case.pipe.transformer, case.pipe.transformer.forward)
    for mine in (calls[::2], calls[1::2]):
        if not view.is_recorded:
            view.record(**mine[0][0])
        kept, shapes = view.new_kept(), dict[str, Any]()
        for i, (arguments, output) in zip(reversed(range(STEPS)), mine):
            with torch.no_grad():
                found = view.planned(artifact.plan.compute[i], kept, i, shapes, (), arguments)
            assert torch.equal(found[0], output)
    view.close()


def test_calls_are_told_apart_by_context_order_and_transformer():
    tracker = CallTracker(3)
    keys = [tracker.locate(0, 0, context) for context in ("cond", "uncond", "uncond")]
    assert keys == [(2, (0, "cond", 0)), (2, (0, "uncond", 0)), (2, (0, "uncond", 1))]
    assert tracker.locate(1, 0, "uncond") == (1, (0, "uncond", 0)), "guidance need not come first, or at all"
    assert tracker.locate(1, 1, "cond") == (1, (1, "cond", 0))
    assert [tracker.locate(2, 0, "")[1] for _ in range(2)] == [(0, "", 0), (0, "", 1)]
    assert tracker.unfinished == 0 and tracker.begins(0) and tracker.begins(3) and not tracker.begins(2)


@pytest.mark.parametrize("places", [(900.0, 500.0, 100.0), (0.1, 0.5, 0.9), (None, 1, 2)])
def test_steps_may_fall_and_rise_and_break_off(places):
    tracker = CallTracker(3)
    assert [tracker.locate(place, 0, "")[0] for place in places] == [2, 1, 0]
    assert [tracker.locate(place, 0, "")[0] for place in places[:2]] == [2, 1]
    assert tracker.unfinished == 2
    assert [tracker.locate(place, 0, "")[0] for place in places] == [2, 1, 0]


def test_a_second_transformer_computes_everything_at_its_first_step():
    case = make_case("wan 2.2")
    nothing = Plan((*((False,) * case.branches,) * (STEPS - 1), (True,) * case.branches))
    harmonica.apply(case.pipe, case.artifact(nothing))
    computed = []
    for transformer in (case.pipe.transformer, case.pipe.transformer_2):
        layer = transformer.blocks[0].attn1.to_q
        layer.register_forward_hook(lambda *_, transformer=transformer: computed.append(transformer))
    case.run()
    computed.clear()
    case.run()
    assert computed == [case.pipe.transformer] * 2 + [case.pipe.transformer_2] * 2


def test_a_batch_that_shrinks_computes_everything_at_that_step():
    case = make_case("z-image truncated")
    nothing = Plan((*((False,) * case.branches,) * (STEPS - 1), (True,) * case.branches))
    harmonica.apply(case.pipe, case.artifact(nothing))
    rows = []
    layer = case.pipe.transformer.layers[0].attention.to_q
    case.run()
    layer.register_forward_hook(lambda _, __, output: rows.append(len(output)))
    case.run()
    assert rows == [4, 2]


# The branch files


@pytest.mark.parametrize("kind", ["dit", "alpha 1024"])
@pytest.mark.parametrize("reuse", ["hold", "forecast"])
def test_the_two_views_of_one_model_make_the_same_latents(kind, reuse, tmp_path):
    case = tiny_attached.make_case(kind, tmp_path)
    artifact = case.artifact(reuse=reuse)
    harmonica.apply(case.transformer, artifact)
    wanted = case.run()
    harmonica.remove(case.transformer)
    view = RecordedTransformer(case.transformer, case.transformer.forward)
    n = len(case.noise)
    view.record(case.noise, timestep=torch.full((n,), 999), **case.one_call)
    recorded = copy.copy(artifact)
    object.__setattr__(recorded, "model", view.identity())
    found, macs = view.macs(), case.model.macs()
    view.close()
    # The file projects the text once a trajectory, diffusers' forward at every step.
    config = case.transformer.config
    projections = 2 * tiny_text.TOKENS * (config.num_attention_heads * config.attention_head_dim) ** 2
    extra = [projections * (branch.kind == "cross") for branch in view.branches]
    assert [cost - more for cost, more in zip(found.branches, extra, strict=True)] == list(macs.branches)
    harmonica.apply(case.transformer, recorded)
    assert apart(case.run(), wanted) < 1e-5
