"""What a cache weighs is known before anything runs."""

import pytest
import tiny_pixart
import tiny_sana
import torch
from torch import Tensor

from harmonica.core.cache import BranchCache, cache_bytes
from harmonica.core.router import Router
from harmonica.core.trajectory import planned_step
from harmonica.data.batch import Batch
from harmonica.models.base import BranchedTransformer
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import SdtConfig
from tests.benchmarks.live_tensors import peak_of


def make(kind: str, tiny_dit) -> tuple[BranchedTransformer, tuple[Tensor, object], str]:
    """A model, three rows for it, and a sampler's name."""
    if kind == "dit":
        return tiny_dit, (torch.randn(3, 4, 8, 8).double(), torch.arange(3)), "ddim"
    if kind == "sana":
        return tiny_sana.make_sana("1.5"), tiny_sana.make_batch("1.5"), "diffusers"
    cacheable = ("attn", "cross", "mlp") if kind == "pixart, all three" else ()
    return tiny_pixart.make_pixart("sigma", *cacheable), tiny_pixart.make_batch("sigma"), "ddim"


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("reuse", ["hold", "forecast"])
@pytest.mark.parametrize("kind", ["dit", "pixart", "pixart, all three", "sana"])
def test_a_full_cache_weighs_what_was_said(kind, reuse, guidance, tiny_dit):
    model, batch, name = make(kind, tiny_dit)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler"} if name == "diffusers" else None
    config = SamplerConfig(name=name, num_inference_steps=4, guidance_scale=guidance, scheduler=scheduler)
    sampler, cache = make_sampler(model, config), BranchCache(len(model.branches), reuse)
    state = sampler.start(*batch)
    for i in (3, 2, 1):
        state, _ = planned_step(sampler, i, state, (True,) * len(model.branches), cache)
    assert cache.nbytes == 3 * cache_bytes(model, reuse, is_guided=guidance != 1)


def test_memory_of_training_does_not_grow_with_the_number_of_steps(tiny_dit):
    def peak(steps: int) -> int:
        sampler = make_sampler(tiny_dit, SamplerConfig(num_inference_steps=steps, guidance_scale=1.5))
        trainer = SdtTrainer(sampler, Router(steps, 6), SdtConfig())
        batch = torch.randn(16, 4, 8, 8).double(), torch.arange(16) % 10
        return peak_of(tiny_dit, lambda: trainer.train_trajectory([Batch(*batch)], torch.ones(steps - 1)))

    assert peak(40) < 1.03 * peak(5), "but for the router itself"
