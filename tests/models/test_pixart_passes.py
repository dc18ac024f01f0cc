"""PixArt under a plan and under a router: against a slow reimplementation, and its own full pass."""

import numpy as np
import pytest
import torch
from tiny_pixart import (
    CACHEABLE,
    FAMILY,
    STEPS,
    TIMES,
    apart,
    config,
    halve,
    make_batch,
    make_pixart,
    slow_network,
)
from tolerances import CLOSE, of_pass, of_trajectory

from harmonica.core.cache import BranchCache
from harmonica.core.passes import planned_pass, soft_pass
from harmonica.core.plan import Plan
from harmonica.core.router import Router
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.models.pixart.model import PixArt
from harmonica.models.text_condition import TextCondition
from harmonica.samplers import make_sampler
from harmonica.training.iepo import KINDS, image_error_proxy
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import SdtConfig


def random_plan(model: PixArt, seed: int = 2) -> Plan:
    rows = torch.rand(STEPS, len(model.branches), generator=torch.Generator().manual_seed(seed)) > 0.5
    rows[-1] = True
    return Plan(tuple(map(tuple, rows.tolist())))


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
    assert apart(ours, x) < of_trajectory(STEPS)  # the sampler rounds its coefficients to float32
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
    assert apart(soft, model(noise, TIMES - 3, condition)) < of_pass(torch.float32)


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
    torch.testing.assert_close(sample(sampler, noise[order], condition[order], plan), whole[order], **CLOSE)


# Training


@pytest.mark.parametrize("cacheable", CACHEABLE[:2], ids="+".join)
@pytest.mark.parametrize("kind", FAMILY)
def test_sdt_and_lambda_reach_every_branch(kind, cacheable):
    model, (noise, condition) = make_pixart(kind, *cacheable), make_batch(kind, 2)
    sampler = make_sampler(model, config("dpm-solver++"))
    router = Router.normal(STEPS, len(model.branches), seed=0).double()
    settings, batches = SdtConfig(beta=0.0, threshold=0.3), [Batch(noise, condition)]
    for how in KINDS:
        lambda_T = image_error_proxy(sampler, router, batches, kind=how, config=settings)
        assert lambda_T.shape == (STEPS - 1,) and lambda_T.isfinite().all() and (lambda_T > 0).all()
    rows = {}
    trainer = SdtTrainer(sampler, router, settings)
    records, final = trainer.train_trajectory(
        batches, lambda_T, on_gradient=lambda i, grad: rows.setdefault(i, grad.clone())
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
            [Batch(noise.float(), condition.to(dtype=model.dtype))],
            torch.ones(STEPS - 1),
            on_gradient=lambda i, grad, rows=rows: rows.setdefault(i, grad.clone()),
        )
        gradients[name] = torch.stack([rows[i] for i in range(STEPS - 1)])
    near = torch.nn.functional.cosine_similarity(gradients["half"], gradients["exact"], dim=1)
    assert near.min() > 0.98
