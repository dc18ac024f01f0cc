"""Models, batches and plans of the comparisons. Random weights: speed does not depend on what was learnt."""

import torch
from torch import Tensor

from harmonica.builtin import FASHION_DIT
from harmonica.core.plan import Plan
from harmonica.core.router import Router
from harmonica.models.base import BranchedTransformer, freeze
from harmonica.models.dit.config import DiTConfig, dit_shape
from harmonica.models.dit.model import DiT
from harmonica.models.loading import read_folder_config
from harmonica.samplers import Ddim, Sampler, SamplerConfig
from harmonica.samplers.noise import SampleKeys
from tests.benchmarks.hardware import PLAIN, Hardware


def builtin_shape() -> DiTConfig:
    """Of the built-in model."""
    return read_folder_config(FASHION_DIT)[0]


def make_dit(shape: DiTConfig | str, hardware: Hardware = PLAIN) -> DiT:
    """A frozen random DiT, none of whose branches is silent."""
    model = DiT(dit_shape(shape) if isinstance(shape, str) else shape)
    model.initialize(torch.Generator().manual_seed(0), zero=False)
    freeze(model)
    return hardware.place(model)


def device_of(model: BranchedTransformer) -> torch.device:
    """Where its weights are."""
    return next(model.parameters()).device


def make_sampler(model: BranchedTransformer, num_steps: int) -> Sampler:
    """Guided DDIM, as latents are sampled."""
    return Ddim(model, SamplerConfig(num_inference_steps=num_steps, guidance_scale=1.5, clip_sample=False))


def make_noise(model: BranchedTransformer, size: int) -> Tensor:
    """(N, C, H, W), each row's own."""
    shape = (model.in_channels, model.sample_size, model.sample_size)
    return torch.from_numpy(SampleKeys.of(1, range(size)).start_noise(shape)).to(device_of(model))


def make_batch(model: BranchedTransformer, size: int) -> tuple[Tensor, Tensor]:
    """Noise and labels."""
    return make_noise(model, size), torch.arange(size, device=device_of(model)) % model.num_classes


def make_router(sampler: Sampler) -> Router:
    """Random scores on both sides of tau."""
    generator = torch.Generator().manual_seed(2)
    shape = (sampler.num_steps, len(sampler.model.branches))
    router = Router.from_logits((2 * torch.randn(shape, generator=generator) - 2).clamp(-5, 5))
    return router.to(device_of(sampler.model))


def random_plan(num_steps: int, num_branches: int, cur: float) -> Plan:
    """Reuse spread evenly over all rows but T-1."""
    entries = (num_steps - 1) * num_branches
    chosen = torch.randperm(entries, generator=torch.Generator().manual_seed(3))
    compute = torch.ones(num_steps * num_branches, dtype=torch.bool)
    compute[chosen[: round(cur * num_steps * num_branches)]] = False
    return Plan(tuple(map(tuple, compute.reshape(num_steps, num_branches).tolist())))


def block_plan(num_steps: int, num_branches: int, cur: float) -> Plan:
    """Reuse in runs of neighbours: the first branches of every row but T-1."""
    reused = round(cur * num_steps * num_branches / (num_steps - 1))
    row = (False,) * reused + (True,) * (num_branches - reused)
    return Plan((row,) * (num_steps - 1) + ((True,) * num_branches,))
