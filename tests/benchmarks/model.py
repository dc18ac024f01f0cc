"""One forward: ours beside diffusers' own module, what reuse costs, and how both grow."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harmonica.core.cache import BranchCache, Reuse
from harmonica.core.passes import planned_pass
from harmonica.core.sampling import sample
from harmonica.models.dit.config import DiTConfig, dit_shape
from harmonica.models.dit.model import DiT
from harmonica.models.dit.stored import StoredModel
from harmonica.torchvision_ops import ensure_torchvision_imports
from tests.benchmarks.arms import block_plan, make_batch, make_dit, make_sampler
from tests.benchmarks.hardware import Hardware, compile_each
from tests.benchmarks.timing import Aim, Row, time_arms


def make_diffusers_dit(model: DiT, hardware: Hardware, kind: Any = None) -> Any:
    """diffusers' module with the same weights, all of it in one precision.

    Args:
        kind: its class, or one made from it.
    """
    ensure_torchvision_imports()
    from diffusers import DiTTransformer2DModel

    from harmonica.models.dit.diffusers_layout import tensors_to_diffusers

    config = model.config
    theirs: Any = (kind or DiTTransformer2DModel)(
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        num_embeds_ada_norm=config.num_embeds_ada_norm,
        norm_eps=config.norm_eps,
    )
    tensors: dict[str, tuple[Tensor, ...]] = {name: (tensor,) for name, tensor in model.state_dict().items()}
    stored = StoredModel(config=config, tensors=tensors, class_names=())
    theirs.load_state_dict(tensors_to_diffusers(stored), strict=False)
    return theirs.to(hardware.device, hardware.dtype).eval().requires_grad_(False)


def as_diffusers(model: DiT, hardware: Hardware) -> Callable[..., Tensor]:
    """diffusers' module with the same weights, its blocks compiled where our branches are."""
    theirs = make_diffusers_dit(model, hardware)
    if hardware.compiled:
        compile_each(theirs.transformer_blocks)

    def run(sample: Tensor, *inputs: Tensor) -> Tensor:
        return theirs(sample.to(hardware.dtype), *inputs, return_dict=False)[0].float()

    return run


def _inputs(model: DiT, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, a timestep and labels."""
    noise, labels = make_batch(model, size)
    return noise, torch.full_like(labels, 500), labels


@torch.inference_mode()
def full_pass(*, whole: bool, hardware: Hardware) -> Iterator[Row]:
    """One uncached forward; diffusers embeds timestep and label again in every block."""
    for name, sizes in (
        ("DiT-B/2", (1, 4, 16)),
        ("DiT-XL/2", (1, 4, 16) if whole or hardware.is_gpu else (1,)),
    ):
        shape = replace(dit_shape(name), downscale_freq_shift=1)
        model = make_dit(shape, hardware)
        theirs = as_diffusers(model, hardware)
        for size in sizes:
            inputs = _inputs(model, size)
            tolerance = hardware.tolerance
            torch.testing.assert_close(model(*inputs), theirs(*inputs), rtol=tolerance, atol=tolerance)
            ours = {"ours": partial(model, *inputs), "diffusers": partial(theirs, *inputs)}
            arms = time_arms(ours, rounds=25 if size == 1 else 5)
            ratio = arms["ours"].median_s / arms["diffusers"].median_s
            what = f"full pass of {name}, batch {size}"
            yield Row.judge(what, arms, ratio, "of diffusers' time", Aim("<=", 1.0))


@torch.inference_mode()
def reused_branch(*, whole: bool, hardware: Hardware) -> Iterator[Row]:
    """What a reused branch costs, next to a computed one: the mean over attention and MLP."""
    for size in (1, 4):
        model = make_dit("DiT-B/2", hardware)
        hidden, conditioning = model.embed(*_inputs(model, 2 * size))
        branches = len(model.branches)
        for reuse in ("hold", "forecast"):
            cache = _warm_cache(model, hidden, conditioning, reuse)
            head = partial(model.head, hidden, conditioning)
            run = partial(_pass_without_writing, model, hidden, conditioning, cache=cache)
            arms = time_arms(
                {"all computed": partial(run, True), "all reused": partial(run, False), "head": head},
                rounds=7,
            )
            seconds = {name: timing.median_s for name, timing in arms.items()}
            ratio = (seconds["all reused"] - seconds["head"]) / (seconds["all computed"] - seconds["head"])
            what = f"a reused branch of DiT-B/2, mean of {branches}, batch {size} guided, {reuse}"
            yield Row.judge(what, arms, ratio, "of a computed one", Aim("<=", 0.03))


def _warm_cache(model: DiT, hidden: Tensor, conditioning: object, reuse: Reuse) -> BranchCache:
    cache = BranchCache(len(model.branches), reuse)
    for step in (9, 8):
        planned_pass(model, hidden, conditioning, (True,) * len(model.branches), cache, step)
    return cache


def _pass_without_writing(
    model: DiT, hidden: Tensor, conditioning: object, is_computed: bool, *, cache: BranchCache
) -> Tensor:
    return planned_pass(model, hidden, conditioning, (is_computed,) * len(model.branches), cache.copy(), 7)


def growth(*, whole: bool, hardware: Hardware) -> Iterator[Row]:
    """Time a step, a block and an image as T, depth and batch grow: at most linear, so at most 1."""
    base = DiTConfig(sample_size=16, num_layers=8, num_attention_heads=6, attention_head_dim=64)

    def run(steps: int = 10, layers: int = 8, size: int = 2) -> Callable[[], Tensor]:
        model = make_dit(replace(base, num_layers=layers), hardware)
        sampler = make_sampler(model, steps)
        plan = block_plan(steps, len(model.branches), 0.4)
        return partial(sample, sampler, *make_batch(model, size), plan)

    for name, few, many, factor in (
        ("T from 10 to 100", run(steps=10), run(steps=100), 10),
        ("depth from 4 to 28", run(layers=4), run(layers=28), 7),
        ("batch from 1 to 64", run(steps=4, size=1), run(steps=4, size=64), 64),
    ):
        arms = time_arms({"few": few, "many": many}, rounds=3)
        ratio = arms["many"].median_s / (factor * arms["few"].median_s)
        what = f"a small DiT under a plan, {name}"
        yield Row.judge(what, arms, ratio, f"of {factor} times the time", Aim("<=", 1.10))
