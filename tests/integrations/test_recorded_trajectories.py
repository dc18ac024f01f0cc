"""A plan on a pipeline without branch files: what ends a trajectory, and what it goes together with."""

import copy
import dataclasses
import threading
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from execution_cases import graphs
from tiny_recorded_pipelines import STEPS, Case, apart, make_case
from torch import Tensor

import harmonica


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
