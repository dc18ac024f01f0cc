"""A small DiT in float32, batches, and every kind of pass: what levels of execution are compared on."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from harmonica.core.plan import Plan, forecast_of
from harmonica.core.sampling import sample
from harmonica.execution import compiled
from harmonica.models.base import BranchedTransformer, freeze
from harmonica.models.dit.config import DiTConfig
from harmonica.models.dit.model import DiT
from harmonica.samplers import Sampler, SamplerConfig, make_sampler

STEPS = 6
SHAPE = DiTConfig(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=8,
    num_embeds_ada_norm=10,
)


def fresh() -> None:
    compiled.compiled_for.cache_clear()
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def make_dit(seed: int = 0, dtype: torch.dtype = torch.float32) -> DiT:
    model = DiT(SHAPE)
    model.initialize(torch.Generator().manual_seed(seed), zero=False)
    freeze(model.to(dtype))
    return model


def make_batch(size: int) -> tuple[Tensor, Tensor]:
    noise = torch.randn(size, 4, 8, 8, generator=torch.Generator().manual_seed(size))
    return noise, torch.arange(size) % 10


def even_plan(num_branches: int) -> Plan:
    return Plan(tuple(((STEPS - 1 - i) % 2 == 0,) * num_branches for i in range(STEPS)))


def random_plan(num_branches: int, *, order: int = 0) -> Plan:
    """Runs of all lengths; an order is that of learned forecasts."""
    generator = torch.Generator().manual_seed(7)
    compute = torch.rand(STEPS, num_branches, generator=generator) > 0.375
    compute[-1] = compute[-2] = compute[-3] = True
    weights = 0.2 * torch.randn(STEPS, num_branches, max(1, order), generator=generator).double()
    return Plan(tuple(map(tuple, compute.tolist())), forecast_of(weights) if order else None)


def segmented(plan: Plan, *, order: int = 0) -> Plan:
    """The plan with neighbours that are reused at the same steps as one; an order is that of its weights."""
    columns = list(zip(*plan.compute, strict=True))
    starts = [b for b in range(plan.num_branches) if b == 0 or columns[b] != columns[b - 1]]
    if order:
        generator = torch.Generator().manual_seed(8)
        weights_TK = 0.2 * torch.randn(STEPS, 1, order, generator=generator).double()
        plan = replace(plan, forecast=forecast_of(weights_TK.expand(-1, plan.num_branches, -1)))
    return replace(plan, segments=tuple(starts))


def ways(num_branches: int) -> dict[str, dict[str, Any]]:
    """Arguments of `sample`: every kind of pass."""
    plan = random_plan(num_branches)
    return {
        "full": {},
        "held": {"plan": plan, "accumulate": False},
        "forecast": {"plan": plan, "reuse": "forecast", "accumulate": False},
        "order 2": {
            "plan": random_plan(num_branches, order=2),
            "reuse": "forecast",
            "accumulate": False,
        },
        "order 3": {
            "plan": random_plan(num_branches, order=3),
            "reuse": "forecast",
            "accumulate": False,
        },
        "segments": {"plan": segmented(plan), "reuse": "forecast"},
        "segments of order 2": {"plan": segmented(even_plan(num_branches), order=2), "reuse": "forecast"},
        "folded segments": {
            "plan": segmented(even_plan(num_branches), order=2),
            "reuse": "forecast",
            "accumulate": True,
        },
        "folded": {"plan": even_plan(num_branches)},
        "folded forecast": {"plan": plan, "reuse": "forecast", "accumulate": True},
    }


def draw(sampler: Sampler, batch: tuple[Any, Any], execution: Any, **how: Any) -> Tensor:
    sampler.model.execution = execution
    return sample(sampler, *batch, **how)


def ddim(model: BranchedTransformer, guidance: float = 1.5) -> Sampler:
    return make_sampler(model, SamplerConfig(num_inference_steps=STEPS, guidance_scale=guidance))
