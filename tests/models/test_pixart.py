"""PixArt as branches: against diffusers' forward and pipelines, and a slow reimplementation."""

import json

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from tiny_pipeline import LINEAR
from tiny_pixart import (
    CACHEABLE,
    FAMILY,
    STEPS,
    TEXT_TOKENS,
    TIMES,
    apart,
    config,
    diffusers_arguments,
    halve,
    make_batch,
    make_pixart,
    make_transformer,
    pipeline_latents,
)
from tolerances import of_pass, of_trajectory
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harmonica.core.artifact import RouterArtifact
from harmonica.core.sampling import sample
from harmonica.models.fingerprint import Fingerprint
from harmonica.models.pixart.model import PixArt
from harmonica.models.text_condition import TextCondition
from harmonica.samplers import make_sampler


@pytest.mark.parametrize("cacheable", CACHEABLE, ids="+".join)
@pytest.mark.parametrize("kind", FAMILY)
def test_the_full_pass_is_diffusers_forward(kind, cacheable):
    model = make_pixart(kind, *cacheable)
    for noise, condition in (make_batch(kind), make_batch(kind, tall=True)):
        theirs = model.transformer(noise, timestep=TIMES, **diffusers_arguments(condition)).sample
        assert apart(model(noise, TIMES, condition), theirs) < of_pass(torch.float64)
        projected = model.full_pass(*model.embed(noise, TIMES, model.project(condition)))
        assert apart(projected, theirs) < of_pass(torch.float64)
    model.float()
    ours = model(noise.float(), TIMES, condition.to(dtype=torch.float32))
    assert apart(ours, theirs) < of_pass(torch.float32)


def test_each_norm_is_its_own_where_norms_have_weights():
    """The public models' have none."""
    transformer = make_transformer("sigma", norm_elementwise_affine=True)
    noise, condition = make_batch("sigma")
    theirs = transformer(noise, timestep=TIMES, **diffusers_arguments(condition)).sample
    ours = PixArt(transformer, text_tokens=TEXT_TOKENS)(noise, TIMES, condition)
    assert apart(ours, theirs) < of_pass(torch.float64)


def test_a_prompt_that_is_all_padding_is_as_in_diffusers():
    model, (noise, condition) = make_pixart("sigma"), make_batch("sigma")
    empty = TextCondition(embeddings=condition.embeddings, mask=torch.zeros(3, TEXT_TOKENS, dtype=torch.bool))
    theirs = model.transformer(noise, timestep=TIMES, **diffusers_arguments(empty)).sample
    assert apart(model(noise, TIMES, empty), theirs) < of_pass(torch.float64)


def test_a_model_without_a_caption_projection_takes_text_as_it_is():
    model, (noise, condition) = make_pixart("alpha"), make_batch("alpha")
    model.transformer.caption_projection = None
    model.transformer.register_to_config(caption_channels=None)
    wide = TextCondition(embeddings=torch.randn(3, TEXT_TOKENS, 24).double(), mask=condition.mask)
    theirs = model.transformer(noise, timestep=TIMES, **diffusers_arguments(wide)).sample
    assert apart(model(noise, TIMES, wide), theirs) < of_pass(torch.float64)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("name", ["dpm-solver++", "ddim by diffusers", "third order by diffusers"])
@pytest.mark.parametrize("kind", FAMILY)
def test_a_trajectory_is_that_of_diffusers_pipeline(kind, name, guidance_scale):
    model, (noise, condition) = make_pixart(kind), make_batch(kind, tall=kind != "sigma")
    scheduler = {
        "dpm-solver++": DPMSolverMultistepScheduler(**LINEAR),
        "ddim by diffusers": DDIMScheduler(clip_sample=False, **LINEAR),
        "third order by diffusers": DPMSolverMultistepScheduler(solver_order=3, **LINEAR),
    }[name]
    theirs = pipeline_latents(
        kind, model, scheduler, noise, condition, num_inference_steps=STEPS, guidance_scale=guidance_scale
    )
    wanted = config(
        "diffusers" if "diffusers" in name else name,
        guidance_scale=guidance_scale,
        scheduler=dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
        if "diffusers" in name
        else None,
    )
    assert theirs.std() > 0.05, "not a flat picture"
    assert apart(sample(make_sampler(model, wanted), noise, condition), theirs) < of_trajectory(STEPS)


# What it costs, and what it is


@pytest.mark.parametrize("cacheable", CACHEABLE, ids="+".join)
@pytest.mark.parametrize("kind", FAMILY)
def test_macs_are_what_torch_counts(kind, cacheable):
    model, (noise, condition) = make_pixart(kind, *cacheable), make_batch(kind, 1)

    def counted(call) -> float:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call()
        return counter.get_total_flops() / 2

    t, macs = TIMES[:1], model.macs()
    assert counted(lambda: model(noise, t, condition)) == macs.full
    theirs = diffusers_arguments(condition)
    assert counted(lambda: model.transformer(noise, timestep=t, **theirs)) == macs.full
    embedded = model.embed(noise, t, condition)
    each = tuple(counted(lambda b=branch: b.compute(*embedded)) for branch in model.branches)
    assert each == macs.branches and all(macs.branches)


def test_shape_and_weights_name_the_model(tmp_path):
    model = make_pixart("alpha")
    shape = model.shape()
    assert json.loads(json.dumps(shape)) == shape
    assert shape["architecture"] == "PixArt" and shape["cacheable"] == ["attn", "mlp"]
    assert (shape["sample_size"], shape["num_layers"], shape["out_channels"]) == (8, 3, 8)
    assert make_pixart("alpha").identity() == model.identity()
    assert model.fingerprint() == Fingerprint.of(make_transformer("alpha").state_dict())
    other = make_pixart("alpha", seed=1)
    assert other.shape() == shape and other.fingerprint() != model.fingerprint()
    other.recorded_fingerprint = model.fingerprint()
    assert other.identity() == model.identity()
    sampler = make_sampler(model, config())
    logits = torch.randn(STEPS, 6, generator=torch.Generator().manual_seed(0))
    RouterArtifact.build(logits, sampler, threshold=0.5, reuse="hold", training={}).save(tmp_path)
    router = RouterArtifact.load(tmp_path)
    router.check(make_pixart("alpha"), sampler.config)
    with pytest.raises(ValueError, match=r"model.cacheable is \['attn', 'cross', 'mlp'\] and the router was"):
        router.check(make_pixart("alpha", "attn", "cross", "mlp"), sampler.config)


def test_what_a_config_leaves_open_is_in_the_shape_as_the_module_decided_it():
    transformer = make_transformer("alpha")
    transformer.register_to_config(use_additional_conditions=None, interpolation_scale=None)
    shape = PixArt(transformer, text_tokens=TEXT_TOKENS).shape()
    assert shape == make_pixart("alpha").shape()
    assert (shape["use_additional_conditions"], shape["interpolation_scale"]) == (False, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cacheable": ()}, r"model.cacheable is \(\): give some of attn, cross, mlp"),
        ({"cacheable": ("attn", "ff")}, "model.cacheable is .*'ff'"),
        ({"cacheable": ("attn", "attn")}, "each once"),
        ({"text_tokens": 0}, "model.text_tokens is 0: give the padded length"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        PixArt(make_transformer("alpha"), **{"text_tokens": TEXT_TOKENS} | settings)


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", FAMILY)
def test_half_precision_keeps_the_residual_stream_or_follows_diffusers(kind, dtype):
    noise, condition = make_batch(kind)
    exact = make_pixart(kind)(noise, TIMES, condition)
    uniform, mixed = make_pixart(kind).to(dtype), halve(make_pixart(kind), dtype)
    assert uniform.dtype == mixed.dtype == dtype
    theirs = uniform.transformer(
        noise.to(dtype), timestep=TIMES, **diffusers_arguments(condition.to(dtype=dtype))
    ).sample
    as_diffusers, ours = (model(noise.float(), TIMES, condition) for model in (uniform, mixed))
    assert (as_diffusers.dtype, ours.dtype) == (dtype, torch.float32)
    hidden, conditioning = mixed.embed(noise, TIMES, condition)
    assert hidden.dtype == conditioning.final[0].dtype == torch.float32
    assert mixed.branches[0].compute(hidden, conditioning).dtype == dtype
    assert apart(as_diffusers, theirs) < of_pass(dtype)
    assert apart(as_diffusers, exact) < of_pass(dtype)
    assert apart(ours, exact) < of_pass(dtype)
