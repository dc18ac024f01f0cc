"""Arms of `python -m tests.benchmarks gpu` in a diffusers pipeline's own loop: even steps, in one line.

FLUX.1's shape with random weights, 28 steps, without its VAE and text encoders. The uncached pipeline with
compiled blocks, which users have today, stands beside the same under `harmonica.EvenSteps`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

import harmonica
from harmonica.integrations.compiled_modules import uncompiled
from harmonica.integrations.diffusers_pipeline import even_speedup
from tests.benchmarks.hardware import Hardware

SPEEDUP = 1.8
TEXT_TOKENS = 512
_SHAPE = {"guidance_embeds": True}
_TINY = {
    "in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 8,
    "axes_dims_rope": (2, 2, 4),
}  # fmt: skip

Draw = Callable[[], Tensor]


def make_pipeline(hardware: Hardware, *, is_tiny: bool) -> tuple[Any, dict[str, Any]]:
    """A random pipeline, made where it runs, and the arguments of a call."""
    with torch.device(hardware.device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(hardware.dtype)  # 12 B parameters in float32 would be 45 GiB
        try:
            transformer: Any = FluxTransformer2DModel(**_SHAPE | (_TINY if is_tiny else {}))
        finally:
            torch.set_default_dtype(before)
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer.eval(), **nothing
    )
    pipe.set_progress_bar_config(disable=True)
    config, where = transformer.config, {"device": hardware.device, "dtype": hardware.dtype}
    side = 128 if is_tiny else 1024
    call = {
        "prompt_embeds": torch.randn(1, 8 if is_tiny else TEXT_TOKENS, config.joint_attention_dim, **where),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, **where),
        "num_inference_steps": 4 if is_tiny else 28,
        "height": side,
        "width": side,
        "output_type": "latent",
    }
    return pipe, call


def draws(hardware: Hardware, *, is_tiny: bool) -> Iterator[tuple[str, str, float, Draw]]:
    """Yield what an arm is named, the arm that computes everything like it, its ideal speed, and the arm.

    An arm is to be run before the next is asked for.
    """
    pipe, call = make_pipeline(hardware, is_tiny=is_tiny)

    def draw() -> Tensor:
        generator = torch.Generator(hardware.device).manual_seed(0)
        images: Tensor = pipe(**call, generator=generator).images
        return images

    def both(way: str) -> Iterator[tuple[str, str, float, Draw]]:
        full = f"diffusers, {way}"
        yield full, full, 1.0, draw
        harmonica.apply(pipe, harmonica.EvenSteps(speedup=1.5 if is_tiny else SPEEDUP))
        draw()  # finds the blocks, and so what they cost
        yield f"EvenSteps, {way}", full, even_speedup(pipe), draw
        harmonica.remove(pipe)

    pipe.transformer.compile_repeated_blocks()
    yield from both("compiled blocks")  # what matters comes first
    with uncompiled(pipe.transformer.modules()):
        yield from both("eager")
