"""Recorded steps: that replays draw what the steps do, and which recordings are kept.

The tests marked `gpu` are written after torch's documentation. No GPU has run them.
"""

import copy
import itertools
import logging
import pickle
from typing import Any

import pytest
import tiny_pixart
import tiny_sana
import torch
from execution_cases import STEPS, ddim, draw, even_plan, make_batch, make_dit, random_plan, ways
from torch import Tensor

from harmonica.core.sampling import sample
from harmonica.execution import graphs
from harmonica.execution.capture_check import NotCapturableError
from harmonica.execution.graphs import BUCKETS, GraphStore, bucket_of, make_recorder
from harmonica.models.step_conditionings import StepConditionings
from harmonica.samplers import Sampler, SamplerConfig, make_sampler
from harmonica.samplers.noise import SampleKeys

pytestmark = pytest.mark.usefixtures("no_codegen", "host_recorder")


def store_of(sampler: Sampler) -> GraphStore:
    store = sampler.model.graphs
    assert isinstance(store, GraphStore)
    return store


def close(ours: Tensor, wanted: Tensor, what: str = "") -> None:
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4, msg=f"{what}: {ours} and {wanted}")


def check_replays(sampler: Sampler, batches: list[tuple[Any, Any]], **how: Any) -> None:
    """The first is run, the second recorded and replayed, the others replayed."""
    for batch in batches:
        close(draw(sampler, batch, "graphed", **how), draw(sampler, batch, "eager", **how))


# Trajectories


@pytest.mark.parametrize("way", ways(4))
def test_replays_draw_what_the_steps_do(way):
    sampler = ddim(make_dit())
    check_replays(sampler, [make_batch(4), make_batch(4), make_batch(3), make_batch(4)], **ways(4)[way])
    assert len(store_of(sampler)) == 1


def test_without_guidance_and_with_a_scale_for_each_row():
    model, batch = make_dit(), make_batch(3)
    plain = ddim(model, 1.0)
    check_replays(plain, [batch] * 2)
    for scales in ([1.5, 4.0, 1.0], [2.0, 1.0, 7.5], [3.0, 3.0, 1.0]):
        check_replays(ddim(model).with_guidance(scales), [batch])
    assert len(store_of(plain)) == 2, "scales are an input"


@pytest.mark.parametrize("kind", ["alpha", "sigma", "sana"])
def test_text_to_image_models(kind):
    if kind == "sana":
        model, batch = tiny_sana.make_sana("1.5"), tiny_sana.make_batch("1.5")
        config = tiny_sana.config(num_inference_steps=STEPS, guidance_scale=3.0)
        sampler: Sampler = make_sampler(model, config)
    else:
        model, batch = tiny_pixart.make_pixart(kind), tiny_pixart.make_batch(kind)
        sampler = ddim(model, 3.0)
    rows = slice(0, 2)
    other = (batch[0].flip(0), batch[1][[2, 1, 0]])
    plan = random_plan(len(model.branches))
    check_replays(sampler, [batch, other, (batch[0][rows], batch[1][rows]), batch, other], plan=plan)
    assert len(store_of(sampler)) == 1


@pytest.mark.parametrize("name", ["iddpm", "dpm-solver++", "sa-solver"])
def test_samplers_that_draw_noise_or_remember_steps(name):
    config = SamplerConfig(name=name, num_inference_steps=STEPS, clip_sample=False)
    sampler = make_sampler(make_dit(), config)
    for seed in range(3):
        keys = SampleKeys.of(seed, range(2))
        check_replays(sampler, [make_batch(2)], keys=keys, plan=random_plan(4))
    assert len(store_of(sampler)) == 1


def test_what_cannot_be_recorded_runs_compiled_and_says_so_once(caplog):
    unipc = {"_class_name": "UniPCMultistepScheduler"}  # it solves for its weights on the device
    config = SamplerConfig(name="diffusers", scheduler=unipc, num_inference_steps=STEPS, clip_sample=False)
    sampler = make_sampler(make_dit(), config)
    with caplog.at_level(logging.WARNING, "harmonica"):
        check_replays(sampler, [make_batch(2)] * 3)
        check_replays(sampler, [make_batch(33)] * 2)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("harmonica")]
    assert len(said) == 2 and len(store_of(sampler)) == 0
    assert "copied from the host inside a step" in said[0] and "33 is larger than 32" in said[1]


def test_previews_come_between_the_steps():
    sampler, batch = ddim(make_dit()), make_batch(3)
    seen: dict[str, dict[int, Tensor]] = {"eager": {}, "graphed": {}}
    for execution in ("eager", "graphed", "graphed"):
        at: dict[int, Tensor] = seen[execution]
        draw(sampler, batch, execution, on_step=lambda i, predict, at=at: at.update({i: predict()}))
    assert list(seen["graphed"]) == list(seen["eager"]) == list(reversed(range(STEPS)))
    for i, preview in seen["eager"].items():
        close(seen["graphed"][i], preview, f"step {i}")


def test_a_cancelled_trajectory_leaves_the_next_one_as_it_is():
    sampler, batch, calls = ddim(make_dit()), make_batch(2), itertools.count()
    check_replays(sampler, [batch] * 2)

    def cancel(i: int, predict: Any) -> None:
        if next(calls) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        draw(sampler, batch, "graphed", on_step=cancel)
    check_replays(sampler, [batch, make_batch(1), batch])


def test_a_conditioning_kept_from_another_batch_is_not_drawn_with(monkeypatch):
    """A mistake of the kind that graphs make easy: the first trajectory's tensors in the second's steps."""
    kept: dict[Any, Any] = {}
    get = StepConditionings.__getitem__

    def remember(self: Any, index: Any) -> Any:
        return kept.setdefault(index, get(self, index))

    monkeypatch.setattr(StepConditionings, "__getitem__", remember)
    sampler = ddim(make_dit())
    for _ in range(2):
        draw(sampler, make_batch(2), "graphed")
    assert len(store_of(sampler)) == 0, "refused: those tensors are no inputs"


# What is kept


def test_recordings_go_when_they_take_more_than_their_bound():
    sampler, batch = ddim(make_dit()), make_batch(1)
    plans = [even_plan(4), random_plan(4)]
    for plan in plans:
        check_replays(sampler, [batch] * 2, plan=plan)
    store = store_of(sampler)
    both = store.nbytes
    assert len(store) == 2
    sampler.model.graphs, sampler.model.graph_bytes = None, both - 1
    for plan in plans:
        check_replays(sampler, [batch] * 3, plan=plan)
    assert len(store_of(sampler)) == 1 and 0 < store_of(sampler).nbytes < both


def test_one_that_is_too_large_alone_is_refused(caplog):
    sampler = ddim(make_dit())
    sampler.model.graph_bytes = 1
    with caplog.at_level(logging.WARNING, "harmonica"):
        check_replays(sampler, [make_batch(1)] * 3)
    assert "give model.graph-memory more" in caplog.text and len(store_of(sampler)) == 0


@pytest.mark.parametrize(
    ("error", "times"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 2),
        (RuntimeError("CUDA error: operation failed due to a previous error during capture"), 2),
        (NotCapturableError("Tensor.item reads a value back inside a step"), 1),
    ],
)
def test_what_may_pass_is_tried_once_more(error, times):
    store, made = GraphStore(1 << 20), []

    def make() -> Any:
        made.append(0)
        raise error

    assert [store.find("key", make) for _ in range(5)] == [None] * 5
    assert len(made) == times and store.reasons == {str(error)}


def test_without_cuda_the_steps_are_run(monkeypatch, caplog):
    monkeypatch.setattr(graphs, "make_recorder", make_recorder)
    sampler, batch = ddim(make_dit()), make_batch(1)
    with caplog.at_level(logging.WARNING, "harmonica"):
        check_replays(sampler, [batch] * 3)
    assert caplog.text.count("a tensor lies on the cpu, and graphs are of CUDA alone") == 1
    assert len(store_of(sampler)) == 0


def test_moved_weights_are_recorded_anew():
    sampler, batch = ddim(make_dit()), make_batch(1)
    check_replays(sampler, [batch] * 2)
    for parameter in sampler.model.parameters():
        parameter.data = 1.01 * parameter.data
    check_replays(sampler, [batch] * 3)
    assert len(store_of(sampler)) == 2


def test_weights_of_which_some_stay_where_they_were_are_recorded_anew():
    sampler, batch = ddim(make_dit()), make_batch(1)
    check_replays(sampler, [batch] * 2)
    *_, last = sampler.model.parameters()
    last.data = 1.5 * last.data
    check_replays(sampler, [batch] * 3)
    assert len(store_of(sampler)) == 2


def test_the_scale_of_guidance_is_read_anew_where_noise_has_another_precision():
    """The recording may not go on with a copy of the buffer, made when it warmed up."""
    sampler = ddim(make_dit())
    noise, condition = make_batch(2)
    for scale in (1.5, 1.5, 4.0, 4.0):
        check_replays(sampler.with_guidance([scale] * 2), [(noise.double(), condition)])
    buffer = torch.full((2, 1, 1, 1), 2.0, dtype=torch.float64)
    twin = sampler.with_scale_buffer(buffer)
    twin.guide(torch.zeros(4, 2 * sampler.model.in_channels, 2, 2))
    assert twin._scale is buffer


def test_copies_of_a_model_begin_without_recordings():
    sampler = ddim(make_dit())
    check_replays(sampler, [make_batch(1)] * 2)
    for twin in (copy.deepcopy(sampler.model), pickle.loads(pickle.dumps(sampler.model))):
        assert len(twin.graphs) == 0 and twin.graphs.max_bytes == sampler.model.graph_bytes


def test_buckets():
    assert [bucket_of(size) for size in (1, 2, 3, 5, 16, 17, 32, 33)] == [1, 2, 4, 8, 16, 32, 32, None]
    assert BUCKETS == (1, 2, 4, 8, 16, 32)


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("way", ways(4))
def test_cuda_graphs_draw_what_the_steps_do_and_wait_for_nothing(way):
    sampler = ddim(make_dit().cuda())
    how = ways(4)[way]
    for size in (4, 4, 3, 4):
        batch = tuple(each.cuda() for each in make_batch(size))
        wanted = draw(sampler, batch, "eager", **how)
        sampler.model.execution = "graphed"
        if size == 3:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            ours = sample(sampler, *batch, **how)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        close(ours, wanted, way)
    assert len(store_of(sampler)) == 1
