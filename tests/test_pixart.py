"""PixArt as branches: against diffusers' forward and pipelines, and a slow reimplementation."""

import json

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from tiny_pipeline import LINEAR
from tiny_pixart import (
    FAMILY,
    TEXT_TOKENS,
    diffusers_arguments,
    make_batch,
    make_pixart,
    make_transformer,
    pipeline_latents,
    slow_network,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harmonica.artifact import RouterArtifact
from harmonica.cache import BranchCache
from harmonica.iepo import KINDS, image_error_proxy
from harmonica.models.base import weights_fingerprint
from harmonica.models.pixart import PixArt
from harmonica.models.text_condition import TextCondition
from harmonica.passes import planned_pass, soft_pass
from harmonica.plan import Plan
from harmonica.router import Router
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.sampling import sample
from harmonica.sdt import SdtConfig, SdtTrainer

CACHEABLE = [("attn", "mlp"), ("attn", "cross", "mlp"), ("cross",), ("mlp",)]
"""What PixArt caches by default, everything, and what leaves sub-layers before the first branch."""
STEPS = 5
TIMES = torch.tensor([999, 500, 3])


def config(name: str = "ddim", **settings) -> SamplerConfig:
    return SamplerConfig(
        name=name, **{"num_inference_steps": STEPS, "guidance_scale": 3.0, "clip_sample": False} | settings
    )


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape and theirs.norm() > 0
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def random_plan(model: PixArt, seed: int = 2) -> Plan:
    rows = torch.rand(STEPS, len(model.branches), generator=torch.Generator().manual_seed(seed)) > 0.5
    rows[-1] = True
    return Plan(tuple(map(tuple, rows.tolist())))


# Against diffusers


@pytest.mark.parametrize("cacheable", CACHEABLE, ids="+".join)
@pytest.mark.parametrize("kind", FAMILY)
def test_the_full_pass_is_diffusers_forward(kind, cacheable):
    model = make_pixart(kind, *cacheable)
    for noise, condition in (make_batch(kind), make_batch(kind, tall=True)):
        theirs = model.transformer(noise, timestep=TIMES, **diffusers_arguments(condition)).sample
        assert apart(model(noise, TIMES, condition), theirs) < 1e-12
        assert apart(model.full_pass(*model.embed(noise, TIMES, model.prepare(condition))), theirs) < 1e-12
    model.float()
    assert apart(model(noise.float(), TIMES, condition.to(dtype=torch.float32)), theirs) < 1e-5


def test_each_norm_is_its_own_where_norms_have_weights():
    """The public models' have none."""
    transformer = make_transformer("sigma", norm_elementwise_affine=True)
    noise, condition = make_batch("sigma")
    theirs = transformer(noise, timestep=TIMES, **diffusers_arguments(condition)).sample
    assert apart(PixArt(transformer, text_tokens=TEXT_TOKENS)(noise, TIMES, condition), theirs) < 1e-12


def test_a_prompt_that_is_all_padding_is_as_in_diffusers():
    model, (noise, condition) = make_pixart("sigma"), make_batch("sigma")
    empty = TextCondition(embeddings=condition.embeddings, mask=torch.zeros(3, TEXT_TOKENS, dtype=torch.bool))
    theirs = model.transformer(noise, timestep=TIMES, **diffusers_arguments(empty)).sample
    assert apart(model(noise, TIMES, empty), theirs) < 1e-12


def test_a_model_without_a_caption_projection_takes_text_as_it_is():
    model, (noise, condition) = make_pixart("alpha"), make_batch("alpha")
    model.transformer.caption_projection = None
    model.transformer.register_to_config(caption_channels=None)
    wide = TextCondition(embeddings=torch.randn(3, TEXT_TOKENS, 24).double(), mask=condition.mask)
    theirs = model.transformer(noise, timestep=TIMES, **diffusers_arguments(wide)).sample
    assert apart(model(noise, TIMES, wide), theirs) < 1e-12


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
    assert apart(sample(make_sampler(model, wanted), noise, condition), theirs) < 1e-6


# Passes


@pytest.mark.parametrize("cacheable", CACHEABLE, ids="+".join)
@pytest.mark.parametrize("kind", FAMILY)
def test_a_planned_trajectory_is_the_slow_one(kind, cacheable):
    """Guided DDIM, halves one after the other; every sub-layer's last computed value is kept by name."""
    model, (noise, condition) = make_pixart(kind, *cacheable), make_batch(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6  # what the slow one knows
    plan, sampler = random_plan(model), make_sampler(model, config())
    names = [branch.name for branch in model.branches]
    assert names == [f"{k} {i}" for i in range(3) for k in ("attn", "cross", "mlp") if k in cacheable]
    negative = TextCondition(
        embeddings=condition.negative_embeddings,
        mask=condition.negative_mask,
        resolution=condition.resolution,
        aspect_ratio=condition.aspect_ratio,
    )
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    kept: dict[tuple[int, str], torch.Tensor] = {}
    x = noise
    for i in reversed(range(STEPS)):
        outputs = []
        for half, words in enumerate((condition, negative)):

            def use(name, y, half=half, i=i):
                if name not in names:
                    return y
                if plan.compute[i][names.index(name)]:
                    kept[half, name] = y
                return kept[half, name]

            t = torch.full((3,), sampler.timesteps[i])
            outputs.append(slow_network(model.transformer, x, t, words, use)[:, :4])
        epsilon = outputs[1] + 3.0 * (outputs[0] - outputs[1])
        now, before = alpha_bar[sampler.timesteps[i]], alpha_bar[sampler.timesteps[i - 1]] if i else 1.0
        clean = (x - (1 - now) ** 0.5 * epsilon) / now**0.5
        x = before**0.5 * clean + (1 - before) ** 0.5 * epsilon
    ours = sample(sampler, noise, condition, plan)
    assert apart(ours, x) < 1e-6  # the sampler rounds its coefficients to float32
    assert apart(sample(sampler, noise, condition), x) > 1e-3, "caching makes a difference"


@pytest.mark.parametrize("cacheable", CACHEABLE, ids="+".join)
def test_passes_agree_where_they_should(cacheable):
    model, (noise, condition) = make_pixart("alpha", *cacheable).float(), make_batch("alpha")
    noise, condition = noise.float(), condition.to(dtype=torch.float32)
    count = len(model.branches)
    sampler = make_sampler(model, config())
    assert torch.equal(
        sample(sampler, noise, condition, Plan.full(STEPS, count)), sample(sampler, noise, condition)
    )
    first, second = (model.embed(noise, TIMES - step, condition) for step in (0, 3))
    cache = BranchCache(count)
    full = planned_pass(model, *first, (True,) * count, cache, 1)
    assert torch.equal(full, model(noise, TIMES, condition))
    soft = soft_pass(model, *second, torch.ones(count), (True,) * count, cache, 0)
    torch.testing.assert_close(soft, model(noise, TIMES - 3, condition), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cacheable", CACHEABLE, ids="+".join)
def test_a_step_runs_what_the_plan_says_and_what_is_never_cached(cacheable):
    model, (noise, condition) = make_pixart("sigma", *cacheable), make_batch("sigma")
    ran = []
    for i, block in enumerate(model.transformer.transformer_blocks):
        parts = {"attn": block.attn1, "cross": block.attn2.to_q, "mlp": block.ff}
        for kind, part in parts.items():
            part.register_forward_pre_hook(lambda *_, name=f"{kind} {i}": ran.append(name))
    count = len(model.branches)
    row = [index % 3 == 1 for index in range(count)]
    cache = BranchCache(count)
    embedded = model.embed(noise, TIMES, condition)
    planned_pass(model, *embedded, (True,) * count, cache, 1)
    everything = [f"{kind} {i}" for i in range(3) for kind in ("attn", "cross", "mlp")]
    assert ran == everything
    ran.clear()
    planned_pass(model, *model.embed(noise, TIMES, condition), row, cache, 0)
    reused = {branch.name for branch, is_computed in zip(model.branches, row) if not is_computed}
    assert ran == [name for name in everything if name not in reused] and len(ran) < 9


def test_a_row_is_the_same_in_any_batch():
    model, (noise, condition) = make_pixart("alpha 1024"), make_batch("alpha 1024")
    sampler, order = make_sampler(model, config("dpm-solver++")), [2, 0]
    plan = random_plan(model)
    whole = sample(sampler, noise, condition, plan)
    torch.testing.assert_close(sample(sampler, noise[order], condition[order], plan), whole[order])


# Training


@pytest.mark.parametrize("cacheable", CACHEABLE[:2], ids="+".join)
@pytest.mark.parametrize("kind", FAMILY)
def test_sdt_and_lambda_reach_every_branch(kind, cacheable):
    model, (noise, condition) = make_pixart(kind, *cacheable), make_batch(kind, 2)
    sampler = make_sampler(model, config("dpm-solver++"))
    router = Router.normal(STEPS, len(model.branches), seed=0).double()
    for how in KINDS:
        lambda_T = image_error_proxy(sampler, router, noise, condition, kind=how, threshold=0.3)
        assert lambda_T.shape == (STEPS - 1,) and lambda_T.isfinite().all() and (lambda_T > 0).all()
    rows = {}
    trainer = SdtTrainer(sampler, router, SdtConfig(beta=0.0, threshold=0.3))
    records, final = trainer.train_trajectory(
        noise, condition, lambda_T, on_gradient=lambda i, grad: rows.setdefault(i, grad.clone())
    )
    gradients = torch.stack([rows[i] for i in range(STEPS - 1)])
    assert gradients.isfinite().all() and (gradients != 0).all()
    assert len(records) == STEPS - 1 and final.isfinite().all()
    assert all(record.mse > 0 for record in records)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_soft_gradients_match_finite_differences():
    model, (noise, condition) = make_pixart("alpha"), make_batch("alpha", 1)
    cache, count = BranchCache(6), 6
    planned_pass(model, *model.embed(noise, TIMES[:1], condition), (True,) * count, cache, 1)
    embedded = model.embed(0.9 * noise, TIMES[:1] - 200, condition)
    weight = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def projected(scores_B):
        row = (True, False) * 3
        return (weight * soft_pass(model, *embedded, scores_B, row, cache.copy(), 0)).sum()

    scores = torch.linspace(0.05, 0.95, count, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(projected, (scores,))


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
    assert model.fingerprint() == weights_fingerprint(make_transformer("alpha").state_dict())
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


def halve(model: PixArt, dtype: torch.dtype) -> PixArt:
    """As a loader does it."""
    for name, parameter in model.named_parameters():
        is_full = name.startswith(model.full_precision_parts)
        parameter.data = parameter.data.to(torch.float32 if is_full else dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.float()
    return model


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
    near = {torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    assert apart(as_diffusers, theirs) < near
    assert apart(ours, exact) < apart(as_diffusers, exact) < near


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_router_is_trained_on_a_half_precision_model(dtype):
    noise, condition = make_batch("sigma")
    gradients = {}
    for name, model in (
        ("exact", make_pixart("sigma").float()),
        ("half", halve(make_pixart("sigma"), dtype)),
    ):
        still, rows = SdtConfig(beta=0.0, learning_rate=1e-30), {}
        router = Router.normal(STEPS, len(model.branches), seed=0)
        SdtTrainer(make_sampler(model, config()), router, still).train_trajectory(
            noise.float(),
            condition.to(dtype=model.dtype),
            torch.ones(STEPS - 1),
            on_gradient=lambda i, grad, rows=rows: rows.setdefault(i, grad.clone()),
        )
        gradients[name] = torch.stack([rows[i] for i in range(STEPS - 1)])
    near = torch.nn.functional.cosine_similarity(gradients["half"], gradients["exact"], dim=1)
    assert near.min() > 0.98
