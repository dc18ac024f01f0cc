"""What training and sampling take, measured, against the formula."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from harmonica.cli import memory
from harmonica.core.cache import BranchCache
from harmonica.core.passes import soft_pass
from harmonica.core.plan import Plan, forecast_of
from harmonica.core.plan_builders import stepwise_plan
from harmonica.core.router import Router
from harmonica.core.segments import with_segments
from harmonica.core.trajectory import planned_step
from harmonica.data.batch import Batch
from harmonica.models.base import BranchedTransformer, freeze
from harmonica.models.dit.model import DiT, DiTConfig
from harmonica.models.text_condition import TextCondition
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.iepo import image_error_proxy
from harmonica.training.memory_estimates import (
    learning_memory,
    public_shape,
    sampling_memory,
    training_memory,
)
from harmonica.training.memory_model import Shape
from harmonica.training.plans.fitted_weights import linear_weights
from harmonica.training.plans.forecast_sketch import sketch_image_error
from harmonica.training.plans.step_sketch import sketch_steps
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import SdtConfig
from tests.benchmarks.live_tensors import SAVINGS, peak_of, peaks_in_both

STEPS = SamplerConfig(num_inference_steps=5, guidance_scale=1.5, clip_sample=False)
REUSES = ("hold", "forecast")


def in_precision(model: BranchedTransformer, dtype: torch.dtype) -> BranchedTransformer:
    """As a loader leaves it."""
    freeze(model)
    for name, parameter in model.named_parameters():
        is_full = name.startswith(model.full_precision_parts)
        parameter.data = parameter.data.to(torch.float32 if is_full else dtype)
    return model


def small_dit() -> tuple[BranchedTransformer, Any]:
    """64 tokens of width 128, twelve branches."""
    shape = DiTConfig(sample_size=16, num_layers=6, num_attention_heads=4, attention_head_dim=32)
    return DiT(shape), torch.zeros(1, dtype=torch.long)


def small_pixart(*, side: int = 16, layers: int = 6, heads: int = 4, dim: int = 32, tokens: int = 12, **kw):
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    from harmonica.models.pixart.model import PixArt

    transformer = PixArtTransformer2DModel(
        sample_size=side,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=dim,
        cross_attention_dim=heads * dim,
        caption_channels=64,
        use_additional_conditions=False,
    )
    text, mask = torch.zeros(1, tokens, 64), torch.ones(1, tokens, dtype=torch.bool)
    condition = TextCondition(
        embeddings=text, mask=mask, negative_embeddings=text.clone(), negative_mask=mask.clone()
    )
    return PixArt(transformer, text_tokens=tokens, **kw), condition


SMALL = {
    "dit": small_dit,
    "pixart": small_pixart,
    "pixart, all three": functools.partial(small_pixart, cacheable=("attn", "cross", "mlp")),
    "pixart, mlp": functools.partial(small_pixart, cacheable=("mlp",)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def saved_bytes(run: Callable[[], Tensor], *excluded: Any) -> int:
    """Of all storages that backward through the result needs, without those of the tensors excluded."""
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    for tensor in tree_leaves(excluded):
        storages.pop(tensor.untyped_storage()._cdata, None)
    total = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    del result
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SMALL)
def test_activations_and_caches_are_within_a_tenth_of_the_formula(kind: str, dtype: str) -> None:
    model, condition = SMALL[kind]()
    in_precision(model, DTYPES[dtype])
    shape, count = Shape.of(model), len(model.branches)
    sampler = make_sampler(model, STEPS)
    noise = torch.randn(1, 4, 16, 16)
    cache = BranchCache(count)
    state, _ = planned_step(sampler, 4, sampler.start(noise, condition), (True,) * count, cache)
    with torch.no_grad():
        hidden, conditioning = sampler.embed(3, state)
    cached = [cache.read(b, 3) for b in range(count)]
    assert sum(value.untyped_storage().nbytes() for value in cached) == count * shape.value(2)
    scores = torch.full((count,), 0.5, requires_grad=True)
    bytes_of = {
        recompute: saved_bytes(
            lambda recompute=recompute: soft_pass(
                model, hidden, conditioning, scores, (False,) * count, cache, 3, recompute=recompute
            ),
            list(model.parameters()),
            cached,
        )
        for recompute in (False, True)
    }
    assert bytes_of[False] == pytest.approx(shape.activations(2), rel=0.1)
    if kind != "pixart, mlp":  # there the last group, which is kept, is smaller than those before
        assert bytes_of[True] == pytest.approx(shape.activations(2, checkpointing=True), rel=0.1)
    assert bytes_of[True] < bytes_of[False] / 2


@pytest.mark.parametrize("reuse", REUSES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(1, 0), (4, 1), (4, 3)])
def test_peak_of_training_is_within_a_tenth_of_the_formula(reuse, recompute, rows, size) -> None:
    model = in_precision(small_dit()[0], torch.float32)
    sampler, router = make_sampler(model, STEPS), Router(5, 12)
    batch = Batch(torch.randn(rows, 4, 16, 16), torch.arange(rows))
    measured, of_hard_plans = (
        peak_of(
            model,
            lambda student=student: SdtTrainer(
                sampler,
                router,
                SdtConfig(reuse=reuse, activation_checkpointing=recompute, student=student),
            ).train_trajectory(batch.split(size), torch.ones(4)),
        )
        for student in ("soft", "hard")
    )
    expected = training_memory(
        Shape.of(model),
        batch_size=rows,
        micro_batch_size=size,
        reuse=reuse,
        activation_checkpointing=recompute,
        num_steps=5,
    )
    assert measured == pytest.approx(expected.total - expected.weights, rel=0.1)
    assert of_hard_plans <= 1.05 * measured


@pytest.mark.slow
@pytest.mark.parametrize("reuse", REUSES)
@pytest.mark.parametrize("name", ["dit-xl-2-512", "pixart-sigma-2048"])
def test_peaks_of_public_models_are_within_a_twentieth_of_the_formula(name, reuse, monkeypatch) -> None:
    """At full size, on tensors without values; four of 28 layers."""
    tall = {"side": 256, "layers": 4, "heads": 16, "dim": 72, "tokens": 300}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        if name.startswith("pixart"):
            model, condition = small_pixart(**tall)
        else:
            model = DiT(DiTConfig(sample_size=64, num_layers=4))
            condition = torch.zeros(1, dtype=torch.long)
        in_precision(model, torch.bfloat16)
    shape, count = Shape.of(model), 8
    full = public_shape(name, torch.bfloat16)
    assert replace(full, layers=4) == replace(
        shape, sharded_weights=full.sharded_weights, other_weights=full.other_weights
    )
    sampler = make_sampler(model, STEPS)
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: [True] * len(tensor))  # of scores without values
    monkeypatch.setattr(Tensor, "item", lambda tensor: 1.0)

    def peak(run: Callable[[Tensor], object]) -> int:
        with mode:
            noise = torch.zeros(1, 4, model.sample_size, model.sample_size)
            return peak_of(model, lambda: run(noise))

    for recompute in (False, True):
        config = SdtConfig(reuse=reuse, activation_checkpointing=recompute)
        measured = peak(
            lambda noise, config=config: SdtTrainer(sampler, Router(5, count), config).train_trajectory(
                [Batch(noise, condition)], torch.ones(4)
            )
        )
        expected = training_memory(
            shape, batch_size=1, reuse=reuse, activation_checkpointing=recompute, num_steps=5
        )
        assert measured == pytest.approx(expected.total - expected.weights, rel=0.05)

    def measure_lambda(noise: Tensor) -> None:
        image_error_proxy(
            sampler,
            Router(5, count),
            [Batch(noise, condition)],
            kind="leave_one_out",
            config=SdtConfig(threshold=0.1, reuse=reuse),
        )

    # Two caches, whatever the number of steps.
    caches = 2 * (1 + (reuse == "forecast")) * count * shape.value(2)
    assert peak(measure_lambda) == pytest.approx(caches + shape.working(2) + shape.prepared(2, 5), rel=0.05)


def test_a_worker_can_do_with_less_the_less_it_does_at_a_time() -> None:
    shape = public_shape("pixart-sigma-2048", torch.bfloat16)
    need = functools.partial(training_memory, shape, batch_size=8)
    totals = [
        need(),
        need(activation_checkpointing=True),
        need(micro_batch_size=1),
        need(micro_batch_size=1, activation_checkpointing=True),
    ]
    assert totals == sorted(totals, key=lambda each: -each.total)
    shared = need(micro_batch_size=1, processes=2).weights
    assert shape.other_weights < shared < 0.53 * totals[0].weights
    assert sampling_memory(shape, batch_size=8).total < need(micro_batch_size=1).total


def test_the_table_has_a_line_for_each_model_asked_for(capsys) -> None:
    assert memory.main(("dit-xl-2-256", "dit-xl-2-512")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| dit-xl-2-256", "| dit-xl-2-512"]
    assert len({line.count("|") for line in lines}) == 1
    assert memory.main(("dit-2k",)) == 2
    assert "model is 'dit-2k': give some of dit-xl-2-256" in capsys.readouterr().err


def test_an_unknown_architecture_is_refused(tiny_dit: DiT, monkeypatch) -> None:
    monkeypatch.setattr(tiny_dit, "shape", lambda: {"architecture": "UViT"})
    with pytest.raises(ValueError, match=r"model.path holds a UViT: .* only that of DiT, PixArt"):
        Shape.of(tiny_dit)


def test_a_model_that_keeps_no_part_in_full_precision_has_a_shape(tiny_dit: DiT, monkeypatch) -> None:
    whole = Shape.of(tiny_dit)
    monkeypatch.setattr(tiny_dit, "full_precision_parts", ())
    assert Shape.of(tiny_dit) == whole, "all of it is float64 here"


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("how", SAVINGS)
@pytest.mark.parametrize("kind", ["dit", "pixart, all three"])
def test_peaks_of_start_and_fit_are_near_the_formula(kind: str, how: str, segments: bool) -> None:
    """The fit's is an upper bound, since a plan may compute some steps before any reuse."""
    model, condition = SMALL[kind]()
    in_precision(model, torch.float32)
    steps, reused = 8, [1, 3, 5]
    config = SamplerConfig(num_inference_steps=steps, guidance_scale=1.5, clip_sample=False)
    sampler, keys = make_sampler(model, config), SampleKeys.of(0, [0])
    batch = Batch(torch.randn(1, 4, model.sample_size, model.sample_size), condition, keys)
    plan = stepwise_plan(steps, len(model.branches), reused)
    plan = Plan(plan.compute, forecast_of(linear_weights(plan, 2)))
    if segments:
        plan = with_segments(plan, model)
    full, savings = torch.zeros_like(batch.noise_NCHW), SAVINGS[how]
    runs = (
        lambda: sketch_steps(
            sampler, batch, reach=7, corrections=0, probes=1, segments=segments, savings=savings
        ),
        lambda: sketch_image_error(sampler, plan, batch, full, order=2, probes=1, savings=savings),
    )
    start, fit = learning_memory(
        Shape.of(model),
        rows_at_once=1,
        computed_steps=steps - len(reused),
        segments=segments,
        savings=savings,
        num_steps=steps,
    )
    peaks, on_host = zip(*(peaks_in_both(model, run) for run in runs), strict=True)
    assert peaks[0] == pytest.approx(start.total - start.weights, rel=0.1)
    assert 0.6 < peaks[1] / (fit.total - fit.weights) < 1.05
    if savings.offload:
        assert on_host[0] == pytest.approx(start.host, rel=0.15)
        assert 0.6 < on_host[1] / fit.host < 1.05
    else:
        assert on_host == (start.host, fit.host) == (0, 0)
