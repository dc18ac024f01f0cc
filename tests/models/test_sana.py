"""Sana as branches: against diffusers' forward and pipeline, and from a folder."""

import json

import pytest
import torch
from tiny_pixart import CACHEABLE, STEPS, TIMES, apart, halve
from tiny_sana import (
    FAMILY,
    SCHEDULERS,
    TEXT_TOKENS,
    config,
    make_batch,
    make_sana,
    make_transformer,
    module_forward,
    pipeline_latents,
)
from tolerances import of_pass
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harmonica.core.artifact import RouterArtifact
from harmonica.core.sampling import sample
from harmonica.models.fingerprint import Fingerprint
from harmonica.models.loading import ModelConfig, load_model
from harmonica.models.sana.model import FULL_PRECISION_PARTS, Sana
from harmonica.models.text_condition import TextCondition
from harmonica.samplers import SamplerConfig, make_sampler, with_scheduler


@pytest.mark.parametrize("cacheable", CACHEABLE, ids="+".join)
@pytest.mark.parametrize("kind", FAMILY)
def test_the_full_pass_is_diffusers_forward(kind, cacheable):
    model = make_sana(kind, *cacheable)
    for noise, condition in (make_batch(kind), make_batch(kind, tall=True)):
        theirs = module_forward(model, noise, TIMES, condition)
        assert apart(model(noise, TIMES, condition), theirs) < of_pass(torch.float32)  # linear attention is
        assert torch.equal(
            model.full_pass(*model.embed(noise, TIMES, model.project(condition))),
            model(noise, TIMES, condition),
        )
    model.float()
    noise, condition = noise.float(), condition.to(dtype=torch.float32)
    theirs = module_forward(model, noise, TIMES, condition)
    assert apart(model(noise, TIMES, condition), theirs) < of_pass(torch.float32)


def test_a_prompt_that_is_all_padding_is_as_in_diffusers():
    model, (noise, condition) = make_sana("1.0"), make_batch("1.0")
    empty = TextCondition(embeddings=condition.embeddings, mask=torch.zeros_like(condition.mask))
    theirs = module_forward(model, noise, TIMES, empty)
    assert apart(model(noise, TIMES, empty), theirs) < of_pass(torch.float32)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        *(("1.0", name) for name in SCHEDULERS),
        ("1.5", "euler"),
        ("patches", "euler"),
        ("patches", "dpm-solver++"),
    ],
)
def test_a_trajectory_is_that_of_diffusers_pipeline(kind, scheduler, guidance_scale):
    model, (noise, condition) = make_sana(kind), make_batch(kind, tall=kind == "1.0")
    theirs = pipeline_latents(
        model,
        SCHEDULERS[scheduler],
        noise,
        condition,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
    )
    sampler = make_sampler(model, config(scheduler, guidance_scale=guidance_scale))
    assert theirs.std() > 0.05, "not a flat picture"
    assert apart(sample(sampler, noise, condition), theirs) < of_pass(torch.float32, 2 * STEPS)


# What it costs, and what it is


@pytest.mark.parametrize("cacheable", CACHEABLE, ids="+".join)
@pytest.mark.parametrize("kind", FAMILY)
def test_macs_are_what_torch_counts(kind, cacheable):
    model, (noise, condition) = make_sana(kind, *cacheable), make_batch(kind, 1)

    def counted(call) -> float:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call()
        return counter.get_total_flops() / 2

    t, macs = TIMES[:1], model.macs()
    assert counted(lambda: model(noise, t, condition)) == macs.full
    assert counted(lambda: module_forward(model, noise, t, condition)) == macs.full
    embedded = model.embed(noise, t, condition)
    each = tuple(counted(lambda b=branch: b.compute(*embedded)) for branch in model.branches)
    assert each == macs.branches and all(macs.branches)


def test_shape_and_weights_name_the_model(tmp_path):
    model = make_sana("1.5")
    shape = model.shape()
    assert json.loads(json.dumps(shape)) == shape
    assert (shape["architecture"], shape["out_channels"], shape["num_layers"]) == ("Sana", 4, 2)
    assert (shape["cacheable"], shape["qk_norm"]) == (["attn", "mlp"], "rms_norm_across_heads")
    assert model.text_shape() == (10, TEXT_TOKENS)
    assert model.fingerprint() == Fingerprint.of(make_transformer("1.5").state_dict())
    assert make_sana("1.5", seed=1).fingerprint() != model.fingerprint()
    sampler = make_sampler(model, config())
    logits = torch.randn(STEPS, 4, generator=torch.Generator().manual_seed(0))
    RouterArtifact.build(logits, sampler, threshold=0.5, reuse="hold", training={}).save(tmp_path)
    router = RouterArtifact.load(tmp_path)
    router.check(make_sana("1.5"), sampler.config)
    with pytest.raises(ValueError, match=r"sampler.scheduler is \{.*FlowMatchEuler.*router was made for"):
        router.check(model, config("euler"))
    with pytest.raises(ValueError, match=r"model.qk_norm is None and the router was made for rms_norm"):
        router.check(make_sana("1.0"), sampler.config)


def test_what_makes_no_sense_is_refused():
    for settings, words in (
        ({"cacheable": ()}, r"model.cacheable is \(\): give some of attn, cross, mlp"),
        ({"cacheable": ("attn", "attn")}, "each once"),
        ({"text_tokens": 0}, "model.text_tokens is 0: give the padded length"),
    ):
        with pytest.raises(ValueError, match=words):
            Sana(make_transformer("1.0"), **settings)
    sprint = make_transformer("1.0")
    sprint.register_to_config(guidance_embeds=True)
    with pytest.raises(ValueError, match=r"model.path holds a Sana-Sprint .*: give a Sana"):
        Sana(sprint)
    noise, condition = make_batch("1.0")
    wide = TextCondition(embeddings=condition.embeddings.repeat(1, 1, 2), mask=condition.mask)
    with pytest.raises(ValueError, match=r"condition.embeddings has width 20 and the model takes 10"):
        make_sana("1.0")(noise, TIMES, wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_residual_stream_or_follows_diffusers(dtype):
    noise, condition = make_batch("patches")
    exact = make_sana("patches")(noise, TIMES, condition)
    uniform, mixed = make_sana("patches").to(dtype), halve(make_sana("patches"), dtype)
    assert uniform.dtype == mixed.dtype == dtype
    theirs = module_forward(uniform, noise.to(dtype), TIMES, condition.to(dtype=dtype))
    as_diffusers, ours = (model(noise.float(), TIMES, condition) for model in (uniform, mixed))
    assert (as_diffusers.dtype, ours.dtype) == (dtype, torch.float32)
    assert apart(as_diffusers, theirs) < of_pass(dtype)
    assert apart(as_diffusers, exact) < of_pass(dtype)
    assert apart(ours, exact) < of_pass(dtype)


# From a folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_is_its_model_and_its_scheduler(tmp_path, dtype):
    transformer = make_transformer("1.5").float()
    transformer.save_pretrained(tmp_path / "transformer")
    SCHEDULERS["dpm-solver++"].save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    cacheable = ("attn", "cross", "mlp")
    loaded = load_model(ModelConfig(path=str(tmp_path), cacheable=cacheable, dtype=str(dtype)[6:]))
    model = loaded.model
    assert (model.text_tokens, model.cacheable) == (300, cacheable)
    assert (loaded.vae_folder, loaded.text_folder, loaded.class_names) == (None, None, ())
    assert model.fingerprint() == Fingerprint.of(dict(transformer.named_parameters()))
    kept = {n for n, p in model.transformer.named_parameters() if p.dtype == torch.float32}
    assert kept == {
        n for n in transformer.state_dict() if dtype == torch.float32 or n.startswith(FULL_PRECISION_PARTS)
    }
    wanted = SamplerConfig(name="diffusers", num_inference_steps=STEPS, guidance_scale=3.0)
    sampler = make_sampler(model, with_scheduler(wanted, loaded.scheduler))
    noise, condition = make_batch("1.5")
    latents = sample(sampler, noise.float(), condition)
    ours = sample(make_sampler(make_sana("1.5"), config()), noise, condition)
    # The halves of guidance by 3 are weighed 3 and -2, and stand for one pass where errors are random.
    assert apart(latents, ours) < 5 * of_pass(dtype)
