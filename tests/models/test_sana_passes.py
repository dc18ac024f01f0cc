"""Sana under a plan and under a router: against a slow reimplementation, and its own full pass."""

import functools

import pytest
import torch
from tiny_pixart import CACHEABLE, STEPS, TIMES, apart
from tiny_sana import FAMILY, SCHEDULERS, config, make_batch, make_sana, pipeline_latents, slow_network
from tolerances import of_pass
from torch import Tensor

import harmonica
from harmonica.core.artifact import RouterArtifact
from harmonica.core.cache import BranchCache
from harmonica.core.passes import planned_pass, soft_pass
from harmonica.core.plan import Plan
from harmonica.core.router import Router
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.models.sana.model import Sana
from harmonica.models.text_condition import TextCondition
from harmonica.samplers import make_sampler
from harmonica.training.iepo import KINDS, image_error_proxy
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import SdtConfig


def random_plan(model: Sana) -> Plan:
    rows = torch.rand(STEPS, len(model.branches), generator=torch.Generator().manual_seed(2)) > 0.5
    rows[-1] = True
    return Plan(tuple(map(tuple, rows.tolist())))


@pytest.mark.parametrize("cacheable", CACHEABLE, ids="+".join)
@pytest.mark.parametrize("kind", FAMILY)
def test_a_planned_trajectory_is_the_slow_one(kind, cacheable):
    """Guided Euler, halves one after the other; every sub-layer's last computed value is kept by name."""
    model, (noise, condition) = make_sana(kind, *cacheable), make_batch(kind)
    plan, sampler = random_plan(model), make_sampler(model, config("euler"))
    names = [branch.name for branch in model.branches]
    assert names == [f"{k} {i}" for i in range(2) for k in ("attn", "cross", "mlp") if k in cacheable]
    negative = TextCondition(embeddings=condition.negative_embeddings, mask=condition.negative_mask)
    kept: dict[tuple[int, str], Tensor] = {}

    def use(half: int, i: int, name: str, y: Tensor) -> Tensor:
        if name not in names:
            return y
        if plan.compute[i][names.index(name)]:
            kept[half, name] = y
        return kept[half, name]

    x = noise
    for i in reversed(range(STEPS)):
        t = torch.full((3,), sampler.timesteps[i])
        outputs = [
            slow_network(model.transformer, x, t, words, functools.partial(use, half, i))
            for half, words in enumerate((condition, negative))
        ]
        velocity = outputs[1] + 3.0 * (outputs[0] - outputs[1])
        x = x - (sampler.timesteps[i] - (sampler.timesteps[i - 1] if i else 0.0)) / 1000 * velocity
    assert apart(sample(sampler, noise, condition, plan), x) < of_pass(torch.float32, 2 * STEPS)
    assert apart(sample(sampler, noise, condition), x) > 1e-3, "caching makes a difference"


@pytest.mark.parametrize("cacheable", CACHEABLE, ids="+".join)
def test_passes_agree_where_they_should(cacheable):
    model, (noise, condition) = make_sana("1.5", *cacheable).float(), make_batch("1.5")
    noise, condition, count = noise.float(), condition.to(dtype=torch.float32), len(model.branches)
    sampler = make_sampler(model, config())
    full = sample(sampler, noise, condition)
    assert torch.equal(sample(sampler, noise, condition, Plan.full(STEPS, count)), full)
    cache = BranchCache(count)
    planned_pass(model, *model.embed(noise, TIMES, condition), (True,) * count, cache, 1)
    embedded = model.embed(noise, TIMES - 3, condition)
    soft = soft_pass(model, *embedded, torch.ones(count), (True,) * count, cache, 0)
    assert apart(soft, model(noise, TIMES - 3, condition)) < of_pass(torch.float32)


@pytest.mark.parametrize("cacheable", CACHEABLE, ids="+".join)
def test_a_step_runs_what_the_plan_says_and_what_is_never_cached(cacheable):
    model, (noise, condition) = make_sana("1.0", *cacheable), make_batch("1.0")
    ran: list[str] = []
    for i, block in enumerate(model.transformer.transformer_blocks):
        for kind, part in {"attn": block.attn1, "cross": block.attn2.to_q, "mlp": block.ff}.items():
            part.register_forward_pre_hook(lambda *_, name=f"{kind} {i}": ran.append(name))
    cache, count = BranchCache(len(model.branches)), len(model.branches)
    everything = [f"{kind} {i}" for i in range(2) for kind in ("attn", "cross", "mlp")]
    reused: set[str] = set()
    for row in ((True,) * count, tuple(index % 2 == 1 for index in range(count))):
        ran.clear()
        planned_pass(model, *model.embed(noise, TIMES, condition), row, cache, 0)
        reused = {branch.name for branch, is_computed in zip(model.branches, row) if not is_computed}
        assert ran == [name for name in everything if name not in reused]
    assert reused


def test_a_row_is_the_same_in_any_batch():
    model, (noise, condition) = make_sana("1.0"), make_batch("1.0")
    sampler, plan, order = make_sampler(model, config()), random_plan(model), [2, 0]
    whole = sample(sampler, noise, condition, plan)
    near = of_pass(torch.float32, 2 * STEPS)  # linear attention is in float32
    assert apart(sample(sampler, noise[order], condition[order], plan), whole[order]) < near


# Training


@pytest.mark.parametrize("cacheable", CACHEABLE[:2], ids="+".join)
@pytest.mark.parametrize("scheduler", ["dpm-solver++", "euler"])
def test_sdt_and_lambda_reach_every_branch(scheduler, cacheable):
    model, (noise, condition) = make_sana("1.5", *cacheable), make_batch("1.5", 2)
    sampler = make_sampler(model, config(scheduler))
    router = Router.normal(STEPS, len(model.branches), seed=0).double()
    settings, batches = SdtConfig(beta=0.0, threshold=0.3), [Batch(noise, condition)]
    for how in KINDS:
        lambda_T = image_error_proxy(sampler, router, batches, kind=how, config=settings)
        assert lambda_T.shape == (STEPS - 1,) and lambda_T.isfinite().all() and (lambda_T > 0).all()
    rows: dict[int, Tensor] = {}
    trainer = SdtTrainer(sampler, router, settings)
    records, final = trainer.train_trajectory(
        batches, lambda_T, on_gradient=lambda i, grad: rows.setdefault(i, grad.clone())
    )
    gradients = torch.stack([rows[i] for i in range(STEPS - 1)])
    assert gradients.isfinite().all() and (gradients != 0).all()
    assert final.isfinite().all() and all(record.mse > 0 for record in records)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    plan = Plan.from_scores(router.logits().sigmoid(), 0.5)
    assert 0 < plan.cur < 1 and sample(sampler, noise, condition, plan).isfinite().all()


# In diffusers' own pipeline


@pytest.mark.parametrize("scheduler", ["dpm-solver++", "euler"])
def test_a_plan_in_the_pipeline_is_the_samplers(scheduler):
    model, (noise, condition) = make_sana("1.5"), make_batch("1.5")
    sampler = make_sampler(model, config(scheduler))
    logits = torch.where(torch.tensor(random_plan(model).compute), 4.0, -4.0)
    artifact = RouterArtifact.build(logits, sampler, threshold=0.5, reuse="hold", training={})
    how = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    plain = pipeline_latents(model, SCHEDULERS[scheduler], noise, condition, **how)
    harmonica.apply(model.transformer, artifact)
    theirs = pipeline_latents(model, SCHEDULERS[scheduler], noise, condition, **how)
    harmonica.remove(model.transformer)
    ours = sample(sampler, noise, condition, artifact.plan)
    assert apart(theirs, ours) < of_pass(torch.float32, 2 * STEPS) < 1e-3 < apart(plain, ours)
    assert torch.equal(pipeline_latents(model, SCHEDULERS[scheduler], noise, condition, **how), plain)
