"""Planned sampling against the full sampler and against the arithmetic, at public sizes."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.sampling import sample
from harmonica.models.base import BranchedTransformer
from harmonica.models.text_condition import TextCondition
from harmonica.samplers import Sampler
from harmonica.torchvision_ops import ensure_torchvision_imports
from tests.benchmarks.arms import (
    block_plan,
    builtin_shape,
    make_batch,
    make_dit,
    make_noise,
    make_sampler,
    random_plan,
)
from tests.benchmarks.hardware import PLAIN, Hardware
from tests.benchmarks.timing import Aim, Row, time_arms

PLANS = {"random": random_plan, "blocks": block_plan}


def planned(
    what: str,
    sampler: Sampler,
    batch: tuple[Tensor, Any],
    *,
    curs: tuple[float, ...],
    kinds: tuple[str, ...],
    reuses: tuple[Reuse, ...] = ("hold", "forecast"),
    rounds: int,
    aim: float,
) -> Iterator[Row]:
    """How much of the arithmetic that each plan leaves out is also time left out."""
    macs, shape = sampler.model.macs(), (sampler.num_steps, len(sampler.model.branches))
    plans = {(kind, cur): PLANS[kind](*shape, cur) for kind in kinds for cur in curs}
    assert torch.equal(sample(sampler, *batch), sample(sampler, *batch, Plan.full(*shape), reuse="forecast"))
    arms: dict[str, Callable[[], Tensor]] = {"full": lambda: sample(sampler, *batch)}
    for (kind, cur), plan in plans.items():
        for reuse in reuses:
            arms[f"{kind} {cur} {reuse}"] = partial(sample, sampler, *batch, plan, reuse=reuse)
    timings = time_arms(arms, rounds=rounds)
    for (kind, cur), plan in plans.items():
        for reuse in reuses:
            full, cached = timings["full"], timings[f"{kind} {cur} {reuse}"]
            share = (1 - cached.median_s / full.median_s) / (1 - 1 / plan.ideal_speedup(macs))
            yield Row.judge(
                f"{what}, T = {sampler.num_steps}, {kind} plan of CUR {plan.cur:.1%}, {reuse}",
                {"full": full, "cached": cached},
                share,
                "realised share",
                Aim(">=", aim),
            )


def _dit(name: str, size: int, steps: int, hardware: Hardware, **settings: Any) -> Iterator[Row]:
    model = make_dit(name if name.startswith("DiT") else builtin_shape(), hardware)
    sampler = make_sampler(model, steps)
    yield from planned(f"{name}, batch {size}", sampler, make_batch(model, size), aim=0.95, **settings)


def make_pixart(
    latent_size: int, layers: int, hardware: Hardware = PLAIN, *, width: int = 1152
) -> BranchedTransformer:
    """A random PixArt-Sigma of some of its 28 blocks; narrower for a trial."""
    ensure_torchvision_imports()
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    from harmonica.models.pixart.model import PixArt

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=latent_size,
        num_layers=layers,
        num_attention_heads=width // 72 or 1,
        attention_head_dim=min(width, 72),
        cross_attention_dim=width,
        caption_channels=4096,
        use_additional_conditions=False,
    )
    transformer.eval().requires_grad_(False)
    return hardware.place(PixArt(transformer, text_tokens=300))


def _pixart(latent_size: int, layers: int, steps: int, hardware: Hardware, **settings: Any) -> Iterator[Row]:
    model = make_pixart(latent_size, layers, hardware)
    text = torch.randn(1, 300, 4096, device=hardware.device, dtype=hardware.dtype)
    mask = torch.ones(1, 300, dtype=torch.bool, device=hardware.device)
    condition = TextCondition(embeddings=text, mask=mask, negative_embeddings=-text, negative_mask=mask)
    batch = make_noise(model, 1), condition
    what = f"PixArt-Sigma {8 * latent_size}, {layers} of 28 blocks, batch 1"
    yield from planned(what, make_sampler(model, steps), batch, aim=0.90, **settings)


def planned_dit(*, whole: bool, hardware: Hardware) -> Iterator[Row]:
    """Planned against full sampling: the built-in model's shape, DiT-B/2 and DiT-XL/2."""
    dit = partial(_dit, hardware=hardware)
    if hardware.is_gpu:
        settings: dict[str, Any] = {"curs": (0.375, 0.5, 0.7), "kinds": ("random", "blocks")}
        for size, steps in itertools.product((1, 8, 32), (10, 20, 50)):
            yield from dit("DiT-XL/2", size, steps, **settings, rounds=7 if whole else 3)
        return
    if whole:
        curs, kinds = (0.2, 0.375, 0.5, 0.7), ("random", "blocks")
        yield from dit("built-in shape", 4, 20, curs=curs, kinds=kinds, rounds=7)
        for size in (1, 4):
            yield from dit("DiT-B/2", size, 20, curs=curs, kinds=kinds, rounds=3)
            yield from dit("DiT-XL/2", size, 20, curs=curs, kinds=kinds, rounds=1)
        return
    yield from dit("built-in shape", 4, 20, curs=(0.375, 0.7), kinds=("random",), rounds=5)
    yield from dit("DiT-B/2", 1, 10, curs=(0.375, 0.7), kinds=("random",), rounds=3)
    yield from dit("DiT-XL/2", 1, 4, curs=(0.5,), kinds=("random", "blocks"), reuses=("hold",), rounds=3)


def planned_pixart(*, whole: bool, hardware: Hardware) -> Iterator[Row]:
    """Planned against full sampling: PixArt-Sigma's shape at 512 and 1024."""
    if whole or hardware.is_gpu:
        for latent_size in (64, 128):
            yield from _pixart(
                latent_size, 28, 20, hardware, curs=(0.55,), kinds=("random", "blocks"), rounds=1
            )
        return
    yield from _pixart(64, 4, 8, hardware, curs=(0.55,), kinds=("random",), rounds=3)
