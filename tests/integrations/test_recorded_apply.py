"""`harmonica.apply` on pipelines whose transformers have no branch files: calls, steps, and what ends one."""

import copy
import dataclasses
import threading
from typing import Any

import pytest
import tiny_attached
import tiny_text
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from execution_cases import graphs
from tiny_recorded_pipelines import KINDS, STEPS, Case, make_case
from torch import Tensor

import harmonica
from harmonica.core.plan import Plan
from harmonica.integrations.recorded.call_tracker import CallTracker
from harmonica.integrations.recorded.view import RecordedTransformer

ONE, TWO_CALLS = ("flux", "sd3", "wan 2.1", "z-image truncated"), ("flux guided", "wan 2.1", "krea2", "qwen")


@pytest.fixture(params=KINDS)
def case(request) -> Case:
    return make_case(request.param)


@pytest.fixture(params=ONE)
def some(request) -> Case:
    return make_case(request.param)


@pytest.fixture
def flux() -> Case:
    return make_case("flux")


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


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


# What ends a trajectory


@pytest.mark.parametrize("calls", [1, 2, STEPS - 1])
def test_an_exception_between_steps_leaves_nothing_behind(some, calls, monkeypatch):
    harmonica.apply(some.pipe, some.artifact(reuse="forecast"))
    wanted, step, count = some.run(), some.pipe.scheduler.step, iter(range(STEPS))

    def breaking(*args: Any, **kwargs: Any) -> Any:
        if next(count) == calls - 1:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(some.pipe.scheduler, "step", breaking)
            some.run(seed=7)
        count = iter(range(STEPS))
        assert torch.equal(some.run(), wanted)


def test_an_error_inside_a_step_leaves_nothing_behind(flux):
    harmonica.apply(flux.pipe, flux.artifact())
    wanted = flux.run()
    layer = flux.pipe.transformer.transformer_blocks[1].norm1
    handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        flux.run(seed=3)
    handle.remove()
    assert torch.equal(flux.run(), wanted)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_call_leaves_nothing_behind(some, after, caplog):
    harmonica.apply(some.pipe, some.artifact())
    wanted = some.run()

    def interrupt(pipe: Any, i: int, _: Any, kept: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = i == after
        return kept

    some.run(seed=5, callback_on_step_end=interrupt)
    assert f"ended after {after + 1} of the router's {STEPS} steps: it was interrupted" in caplog.text
    assert torch.equal(some.run(), wanted)


def test_sizes_and_batches_may_change_from_call_to_call(flux):
    harmonica.apply(flux.pipe, flux.artifact())
    wanted = flux.run()
    one = {key: value[:1] for key, value in flux.call.items() if isinstance(value, Tensor)}
    for changes in ({"height": 32}, one, one | {"width": 32}):
        found = flux.run(**changes)
        harmonica.remove(flux.pipe)
        harmonica.apply(flux.pipe, flux.artifact())
        assert torch.equal(flux.run(**changes), found)
    assert torch.equal(flux.run(), wanted)


def test_a_copy_follows_a_plan_of_its_own(some):
    harmonica.apply(some.pipe, some.artifact())
    wanted = some.run()
    twin = Case(copy.deepcopy(some.pipe), some.call, some.view)
    harmonica.remove(some.pipe)
    assert torch.equal(twin.run(), wanted) and not torch.equal(some.run(), wanted)


def test_a_second_call_meanwhile_is_refused_and_the_first_one_unharmed(flux):
    harmonica.apply(flux.pipe, flux.artifact())
    wanted, errors = flux.run(), []

    def meanwhile() -> None:
        try:
            flux.run(seed=9)
        except ValueError as error:
            errors.append(str(error))

    def start_another(_: Any, i: int, __: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if i == 1:
            other = threading.Thread(target=meanwhile)
            other.start()
            other.join()
        return kept

    assert torch.equal(flux.run(callback_on_step_end=start_another), wanted)
    assert len(errors) == 1 and "a second call came while one runs" in errors[0]
    assert torch.equal(flux.run(), wanted)


@pytest.mark.parametrize("is_hooked_first", [True, False])
def test_accelerates_hooks_go_with_a_plan(flux, is_hooked_first):
    transformer = flux.pipe.transformer
    before = flux.run()
    harmonica.apply(flux.pipe, flux.artifact())
    wanted = flux.run()
    if is_hooked_first:
        harmonica.remove(flux.pipe)
        add_hook_to_module(transformer, ModelHook())
        harmonica.apply(flux.pipe, flux.artifact())
    else:
        add_hook_to_module(transformer, ModelHook())
    assert torch.equal(flux.run(), wanted)
    harmonica.remove(flux.pipe)
    assert torch.equal(flux.run(), before)
    remove_hook_from_module(transformer)
    assert torch.equal(flux.run(), before)


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled_first", [True, False])
@pytest.mark.parametrize(
    ("kind", "blocks"),
    [("flux", ("FluxTransformerBlock", "FluxSingleTransformerBlock")), ("sd3", ("JointTransformerBlock",))],
)
def test_compiled_blocks_make_the_same_latents(kind, blocks, is_compiled_first):
    plain, case, graphs = make_case(kind), make_case(kind), []
    harmonica.apply(plain.pipe, plain.artifact())

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    def compile_blocks() -> None:
        for each in case.pipe.transformer.modules():
            if type(each).__name__ in blocks:
                each.compile(backend=backend)

    torch.compiler.reset()
    if is_compiled_first:
        compile_blocks()
    harmonica.apply(case.pipe, case.artifact())
    if not is_compiled_first:
        compile_blocks()
    for seed in (1, 2):
        assert apart(case.run(seed=seed), plain.run(seed=seed)) < 1e-5
    assert graphs


def test_compiled_branches_make_the_same_latents(flux, no_codegen):
    """Also in a copy, which compiles them anew."""
    harmonica.apply(flux.pipe, flux.artifact())
    wanted = flux.run()
    harmonica.remove(flux.pipe)
    harmonica.apply(flux.pipe, flux.artifact(), execution="compiled")
    assert apart(flux.run(), wanted) < 1e-5
    compiled = graphs()
    assert compiled > 0
    assert apart(flux.run(), wanted) < 1e-5 and graphs() == compiled, "none compiled again"
    again = dataclasses.replace(flux, pipe=copy.deepcopy(flux.pipe))
    assert apart(again.run(), wanted) < 1e-5
    harmonica.remove(flux.pipe)


# Refusals


@pytest.mark.parametrize("steps", [STEPS - 1, STEPS + 1])
def test_another_number_of_steps_is_refused(some, steps):
    harmonica.apply(some.pipe, some.artifact())
    wanted = some.run()
    with pytest.raises(ValueError, match=f"is to make {steps} steps and .* made for {STEPS}: give"):
        some.run(num_inference_steps=steps)
    assert torch.equal(some.run(), wanted)


def test_another_scheduler_is_refused(flux):
    harmonica.apply(flux.pipe, flux.artifact())

    class Other(FlowMatchEulerDiscreteScheduler):
        pass

    flux.pipe.scheduler = Other()
    with pytest.raises(ValueError, match=r"pipe.scheduler is a Other and .* made for a FlowMatchEuler"):
        flux.run()
    harmonica.remove(flux.pipe)
    harmonica.apply(flux.pipe, flux.artifact(), allow_other_sampler=True)
    flux.run()


def test_other_transformers_weights_and_versions_are_refused(flux):
    artifact = flux.artifact()
    with pytest.raises(ValueError, match=r"is a SD3Transformer2DModel and .* made for a FluxTransformer2D"):
        harmonica.apply(make_case("sd3").pipe, artifact)
    older = copy.deepcopy(artifact)
    older.model["branches"][0]["name"] = "transformer_blocks.0.attention"
    older.model["diffusers"] = "0.99.0"
    harmonica.apply(flux.pipe, older)
    with pytest.raises(ValueError, match=r"8 under 0.99.0; they differ in transformer_blocks.0.attn: use"):
        flux.run()
    harmonica.remove(flux.pipe)
    flux.pipe.transformer.x_embedder.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"model.weights is .* these are other weights"):
        harmonica.apply(flux.pipe, artifact)
    harmonica.apply(flux.pipe, artifact, check_weights=False)


def test_one_of_two_transformers_is_refused():
    case = make_case("wan 2.2")
    with pytest.raises(ValueError, match=r"made for 2 transformers that .* and is given 1: apply it to"):
        harmonica.apply(case.pipe.transformer, case.artifact())


def test_a_pipeline_without_a_transformer_is_refused(flux):
    class Unet:
        unet = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match=r"pipe is a Unet, which has no transformer: its denoiser is a UNet"):
        harmonica.apply(Unet(), flux.artifact())


def test_diffusers_own_caches_are_refused(flux):
    apply_first_block_cache(flux.pipe.transformer, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"has the hook .*, which changes what is computed"):
        harmonica.apply(flux.pipe, flux.artifact())


def test_applied_twice_and_removed_twice_raise(flux):
    harmonica.apply(flux.pipe, flux.artifact())
    with pytest.raises(ValueError, match=r"has a plan already: harmonica.remove\(transformer\) first"):
        harmonica.apply(flux.pipe.transformer, flux.artifact())
    harmonica.remove(flux.pipe.transformer)
    with pytest.raises(ValueError, match=r"has no plan"):
        harmonica.remove(flux.pipe)


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
