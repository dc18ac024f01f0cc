"""Steps of a pipeline that are replayed from recordings, by the recorder's twin on the CPU."""

import copy
import itertools
import logging
from typing import Any

import pytest
import tiny_sana
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from tiny_attached import KINDS, STEPS, Case, apart, make_case, planned_sana, sana_arguments
from tolerances import of_trajectory
from torch import Tensor, nn

import harmonica
from harmonica.execution.graphs import GraphStore

pytestmark = pytest.mark.usefixtures("no_codegen", "host_recorder")

NEAR = of_trajectory(STEPS)


def store_of(transformer: Any) -> GraphStore:
    store = transformer._harmonica.recordings
    assert isinstance(store, GraphStore)
    return store


def check(case: Case, artifact: Any, calls: list[dict[str, Any]]) -> None:
    """Draw the same under a plan that is recorded as under one that is run."""
    harmonica.apply(case.transformer, artifact)
    wanted = [case.run(**each) for each in calls]
    harmonica.remove(case.transformer)
    harmonica.apply(case.transformer, artifact, execution="graphed")
    for each, latents in zip(calls, wanted):
        assert apart(case.run(**each), latents) < NEAR


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how",
    [
        {"reuse": "hold"},
        {"reuse": "forecast", "is_corrected": True},
        {"reuse": "forecast", "has_segments": True},
    ],
    ids=["hold", "corrected", "segments"],
)
def test_replays_make_what_the_steps_make(kind, how, tmp_path):
    case = make_case(kind, tmp_path)
    check(case, case.artifact(**how), [{"seed": seed} for seed in range(4)])
    store = store_of(case.transformer)
    assert len(store) == 1 and not store.reasons


def test_sana():
    noise, condition = tiny_sana.make_batch("1.5")
    run, graphed = planned_sana(), planned_sana(execution="graphed")
    for seed in range(3):
        noise = torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed), dtype=noise.dtype)
        drawn = [pipe(latents=noise, **sana_arguments(noise, condition)).images for pipe in (run, graphed)]
        assert apart(*drawn) < NEAR
    assert len(store_of(graphed.transformer)) == 1


def test_shapes_are_recorded_apart(case):
    """Without guidance there is half of the batch."""
    sizes = [{}, {"guidance_scale": 1.0}]
    check(case, case.artifact(), [sizes[i] | {"seed": seed} for seed, i in enumerate((0, 1, 0, 1, 1, 0))])
    assert len(store_of(case.transformer)) == 2


def test_a_text_that_changes_on_the_way_is_followed():
    """The pipeline's callback gives other embeddings after a step, and changes those in place later."""
    noise, condition = tiny_sana.make_batch("1.5")
    texts = 0.5 * torch.cat([condition.embeddings, condition.negative_embeddings])

    def change(pipe: Any, step: int, timestep: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": texts.clone() if step == 0 else given["prompt_embeds"].mul_(1.1)}

    call = sana_arguments(noise, condition) | {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    run, graphed = planned_sana(), planned_sana(execution="graphed")
    wanted, unchanged = (
        run(latents=noise, **call).images,
        run(latents=noise, **sana_arguments(noise, condition)),
    )
    assert apart(wanted, unchanged.images) > 1e-3
    for _ in range(3):
        assert apart(graphed(latents=noise, **call).images, wanted) < NEAR
    assert len(store_of(graphed.transformer)) == 1


def test_a_label_that_changes_in_place_is_followed(dit):
    labels = torch.tensor([207, 360])

    def draw() -> list[Tensor]:
        labels.copy_(torch.tensor([207, 360]))
        found = []
        for timestep in dit.pipe.scheduler.timesteps.tolist():
            with torch.no_grad():
                found.append(
                    dit.transformer(dit.noise, timestep=torch.full((2,), timestep), class_labels=labels)[0]
                )
            labels.add_(1)
        return found

    artifact = dit.artifact()
    dit.run()  # sets the timesteps
    harmonica.apply(dit.transformer, artifact)
    wanted = draw()
    harmonica.remove(dit.transformer)
    harmonica.apply(dit.transformer, artifact, execution="graphed")
    *_, one, other = drawn = [draw() for _ in range(3)]
    assert all(apart(ours, theirs) < NEAR for each in drawn for ours, theirs in zip(each, wanted))
    assert not {each.data_ptr() for each in one} & {each.data_ptr() for each in other}, (
        "nothing is overwritten"
    )
    assert len(store_of(dit.transformer)) == 1


class Adapted(nn.Module):
    """A linear layer as PEFT wraps it: its strength is a number, and no tensor."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.scaling = layer, {"default": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) * self.scaling["default"]


def test_the_strength_of_an_adapter_is_followed(case):
    layers = [Adapted(block.ff.net[2]) for block in case.transformer.transformer_blocks]
    for block, layer in zip(case.transformer.transformer_blocks, layers):
        block.ff.net[2] = layer
    artifact, wanted = case.artifact(), {}
    harmonica.apply(case.transformer, artifact, check_weights=False)
    for strength in (1.0, 0.5):
        for layer in layers:
            layer.scaling["default"] = strength
        wanted[strength] = case.run()
    assert apart(wanted[1.0], wanted[0.5]) > 1e-3
    harmonica.remove(case.transformer)
    harmonica.apply(case.transformer, artifact, check_weights=False, execution="graphed")
    for strength in (1.0, 1.0, 0.5, 0.5, 1.0):
        for layer in layers:
            layer.scaling["default"] = strength
        assert apart(case.run(), wanted[strength]) < NEAR
    assert len(store_of(case.transformer)) == 2


def test_a_call_that_ends_early_leaves_the_next_one_as_it_is(case, monkeypatch):
    check(case, case.artifact(), [{}, {}])
    wanted, step, calls = case.run(), case.pipe.scheduler.step, itertools.count()

    def broken(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1:
            raise InterruptedError
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(case.pipe.scheduler, "step", broken)
        with pytest.raises(InterruptedError):
            case.run(seed=8)
    assert apart(case.run(), wanted) < NEAR


def test_with_and_without_inference_mode(case):
    artifact = case.artifact()
    harmonica.apply(case.transformer, artifact, execution="graphed")
    found = []
    for is_inference in (False, True, False, True):
        with torch.inference_mode(is_inference):
            found.append(case.run().clone())
    assert all(apart(each, found[0]) < NEAR for each in found)
    assert len(store_of(case.transformer)) == 1


@pytest.mark.parametrize("execution", ["compiled", "graphed"])
@pytest.mark.parametrize("hook", ["layerwise_casting", "group_offloading", "AlignDevicesHook"])
def test_weights_that_are_moved_at_each_use_are_not_compiled(hook, execution, dit, caplog):
    artifact = dit.artifact()
    if hook == "layerwise_casting":
        dit.transformer.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float64)
    elif hook == "group_offloading":
        apply_group_offloading(dit.transformer, torch.device("cpu"), offload_type="leaf_level")
    else:
        add_hook_to_module(dit.transformer.proj_out_2, AlignDevicesHook("cpu"))
    harmonica.apply(dit.transformer, artifact)
    wanted = dit.run()
    harmonica.remove(dit.transformer)
    harmonica.apply(dit.transformer, artifact, execution=execution)
    with caplog.at_level(logging.WARNING, "harmonica"):
        assert all(torch.equal(dit.run(), wanted) for _ in range(3))
    said = [each.getMessage() for each in caplog.records if each.name.startswith("harmonica")]
    assert len(said) == 1 and f"has the hook {hook}, which moves weights" in said[0]


def test_under_autocast_the_steps_are_run(case, caplog):
    case.pipe.to(torch.float32)
    harmonica.apply(case.transformer, case.artifact(), check_weights=False, execution="graphed")
    with caplog.at_level(logging.WARNING, "harmonica"), torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            assert case.run().isfinite().all()
    assert "torch.autocast is on" in caplog.text and len(store_of(case.transformer)) == 0


def test_a_copy_records_for_itself(case):
    harmonica.apply(case.transformer, case.artifact(), execution="graphed")
    wanted = case.run()
    case.run()
    theirs = copy.deepcopy(case.transformer)
    assert len(store_of(case.transformer)) == 1 and len(store_of(theirs)) == 0
    case.pipe.transformer = theirs
    assert all(apart(case.run(), wanted) < NEAR for _ in range(3)) and len(store_of(theirs)) == 1


def test_other_plans_and_compiled_transformers_are_refused(case):
    with pytest.raises(ValueError, match=r"execution is 'graphed', which needs a router that was trained"):
        harmonica.apply(case.transformer, harmonica.EvenSteps(speedup=1.5), execution="graphed")
    compiled = torch.compile(case.transformer)
    with pytest.raises(ValueError, match=r"execution is 'graphed', and the transformer is compiled as a wh"):
        harmonica.apply(compiled, case.artifact(), execution="graphed")
