"""Small random Sanas and prompts, schedulers of flow matching, and the network once more, slowly.

The slow one takes nothing of `harmonica` and no layer of torch or diffusers: a state dict, heads and
kernel taps looped over, padding left out instead of masked.
"""

import json
import math
from collections.abc import Callable

import torch
from slow_dit import gelu_tanh, linear, modulated_norm, patch_slices, silu
from tiny_pixart import STEPS
from torch import Tensor

from harmonica.models.base import freeze
from harmonica.models.sana.model import Sana
from harmonica.models.text_condition import TextCondition
from harmonica.samplers import SamplerConfig
from harmonica.torchvision_ops import ensure_torchvision_imports

ensure_torchvision_imports()

from diffusers import SanaPipeline, SanaTransformer2DModel  # noqa: E402
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler  # noqa: E402
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (  # noqa: E402
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler  # noqa: E402

HEADS, WIDTH, TEXT_TOKENS, TEXT_WIDTH, SIDE = 3, 24, 7, 10, 4
SHAPES: dict[str, dict] = {
    "1.0": {},
    "1.5": {"qk_norm": "rms_norm_across_heads"},
    "patches": {"sample_size": 2 * SIDE, "patch_size": 2, "interpolation_scale": 1.0, "timestep_scale": 0.5},
}
FAMILY = tuple(SHAPES)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = {
    "dpm-solver++": DPMSolverMultistepScheduler(**FLOW),  # as of the public Sana folders
    "euler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "third order": DPMSolverMultistepScheduler(solver_order=3, **FLOW),
    "unipc": UniPCMultistepScheduler(**FLOW),
}
Use = Callable[[str, Tensor], Tensor]
"""What the sub-layer of a name adds, before its gate, given what it computes."""


def make_transformer(kind: str, *, seed: int = 0) -> SanaTransformer2DModel:
    """float64, two blocks. No gate is small: a silent branch would make any caching right."""
    transformer = SanaTransformer2DModel(
        **{"in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": SIDE} | SHAPES[kind],
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        num_cross_attention_heads=2,
        cross_attention_head_dim=WIDTH // 2,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
    ).double()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        size = 0.5 if parameter.ndim == 1 or "table" in name else parameter[0].numel() ** -0.5
        torch.nn.init.normal_(parameter, "norm" in name, size, generator=generator)
    return transformer.eval()


def make_sana(kind: str, *cacheable, seed: int = 0) -> Sana:
    settings = {"cacheable": cacheable} if cacheable else {}
    model = Sana(make_transformer(kind, seed=seed), text_tokens=TEXT_TOKENS, **settings)
    freeze(model)
    return model


def make_batch(kind: str, n: int = 3, *, tall: bool = False) -> tuple[Tensor, TextCondition]:
    """Noise (n, 4, H, W) and prompts of differing lengths, their negatives shorter; float64."""
    generator = torch.Generator().manual_seed(1)
    side = SHAPES[kind].get("sample_size", SIDE)
    noise = torch.randn(n, 4, side * (1 + tall), side, generator=generator, dtype=torch.float64)
    texts = torch.randn(2, n, TEXT_TOKENS, TEXT_WIDTH, generator=generator, dtype=torch.float64)
    place, lengths = torch.arange(TEXT_TOKENS), torch.arange(n)[:, None]
    return noise, TextCondition(
        embeddings=texts[0],
        mask=place < TEXT_TOKENS - 2 * lengths,
        negative_embeddings=texts[1],
        negative_mask=place < 1 + lengths,
    )


def config(scheduler: str = "dpm-solver++", **settings) -> SamplerConfig:
    """That of a folder with this scheduler."""
    stored = json.loads(SCHEDULERS[scheduler].to_json_string())
    defaults = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "scheduler": stored}
    return SamplerConfig(name="diffusers", **defaults | settings)


def module_forward(model: Sana, noise: Tensor, times: Tensor, condition: TextCondition) -> Tensor:
    return model.transformer(
        noise,
        encoder_hidden_states=condition.embeddings,
        encoder_attention_mask=condition.mask,
        timestep=times * model.transformer.config.timestep_scale,
    ).sample


def pipeline_latents(model: Sana, scheduler: object, noise: Tensor, condition: TextCondition, **kw) -> Tensor:
    """(n, 4, H, W) by diffusers' own pipeline, which takes a latent for 32 pixels without a VAE."""
    pipe = SanaPipeline(None, None, None, model.transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        negative_prompt=None,
        prompt_embeds=condition.embeddings,
        prompt_attention_mask=condition.mask.long(),
        negative_prompt_embeds=condition.negative_embeddings,
        negative_prompt_attention_mask=condition.negative_mask.long(),
        latents=noise,
        height=32 * noise.shape[2],
        width=32 * noise.shape[3],
        use_resolution_binning=False,
        output_type="latent",
        **kw,
    ).images


def slow_network(transformer, x: Tensor, t: Tensor, condition: TextCondition, use: Use) -> Tensor:
    w, shape, n = transformer.state_dict(), transformer.config, len(x)
    patch = shape.patch_size
    side = shape.sample_size // patch
    slices = patch_slices(shape.sample_size, patch)
    kernel = w["patch_embed.proj.weight"].reshape(WIDTH, -1)
    tokens = [x[:, :, rows, columns].reshape(n, -1) @ kernel.T for rows, columns in slices]
    hidden = torch.stack(tokens, dim=1) + w["patch_embed.proj.bias"]
    if shape.interpolation_scale:
        hidden = hidden + transformer.patch_embed.pos_embed

    def maybe(name: str, values: Tensor) -> Tensor:
        """A linear layer with a bias or without."""
        return values @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def rms(name: str, values: Tensor) -> Tensor:
        """Root mean square norm, where the model has it."""
        if f"{name}.weight" not in w:
            return values
        return values / torch.sqrt((values**2).mean(-1, keepdim=True) + 1e-5) * w[f"{name}.weight"]

    angle = (t * shape.timestep_scale).float()[:, None] * torch.exp(
        -math.log(10000) * torch.arange(128, dtype=torch.float32) / 128
    )
    time = torch.cat([torch.cos(angle), torch.sin(angle)], dim=1).double()
    time = linear(w, "time_embed.emb.timestep_embedder.linear_1", time)
    time = linear(w, "time_embed.emb.timestep_embedder.linear_2", silu(time))
    modulation = linear(w, "time_embed.linear", silu(time)).reshape(n, 6, WIDTH)
    text = linear(w, "caption_projection.linear_1", condition.embeddings)
    text = rms("caption_norm", linear(w, "caption_projection.linear_2", gelu_tanh(text)))

    def attend(name: str, query: Tensor, other: Tensor, heads: int, weigh: Callable) -> Tensor:
        """(L, D) that looks at (S, D)."""
        q = rms(f"{name}.norm_q", maybe(f"{name}.to_q", query))
        k = rms(f"{name}.norm_k", maybe(f"{name}.to_k", other))
        v, found = maybe(f"{name}.to_v", other), []
        for part in torch.arange(WIDTH).chunk(heads):
            weights = weigh(q[:, part], k[:, part])
            found.append(weights / weights.sum(1, keepdim=True).clamp_min(1e-15) @ v[:, part])
        return linear(w, f"{name}.to_out.0", torch.cat(found, dim=1))

    def softmax(q: Tensor, k: Tensor) -> Tensor:
        return torch.exp(q @ k.T / math.sqrt(q.shape[1]))

    def relu(q: Tensor, k: Tensor) -> Tensor:
        return q.clamp_min(0) @ k.clamp_min(0).T

    def mix(name: str, values: Tensor) -> Tensor:
        """(n, L, D): 1x1, then depthwise 3x3 with a gate, then 1x1."""
        wide = silu(
            values @ w[f"{name}.conv_inverted.weight"][:, :, 0, 0].T + w[f"{name}.conv_inverted.bias"]
        )
        framed = wide.new_zeros(n, side + 2, side + 2, wide.shape[-1])
        framed[:, 1:-1, 1:-1] = wide.reshape(n, side, side, -1)
        taps = w[f"{name}.conv_depth.weight"]
        deep = (
            sum(
                taps[:, 0, i, j] * framed[:, i : i + side, j : j + side] for i in range(3) for j in range(3)
            ).reshape(n, side * side, -1)
            + w[f"{name}.conv_depth.bias"]
        )
        straight, gate = deep.chunk(2, dim=-1)
        return (straight * silu(gate)) @ w[f"{name}.conv_point.weight"][:, :, 0, 0].T

    for i in range(shape.num_layers):
        block = f"transformer_blocks.{i}"
        six = (modulation + w[f"{block}.scale_shift_table"]).unbind(1)
        normed = modulated_norm(hidden, six[0], six[1])
        y = torch.stack([attend(f"{block}.attn1", row, row, HEADS, relu) for row in normed])
        hidden = hidden + six[2][:, None] * use(f"attn {i}", y)
        words = [row[mask] for row, mask in zip(text, condition.mask)]
        y = torch.stack([attend(f"{block}.attn2", *each, 2, softmax) for each in zip(hidden, words)])
        hidden = hidden + use(f"cross {i}", y)
        y = mix(f"{block}.ff", modulated_norm(hidden, six[3], six[4]))
        hidden = hidden + six[5][:, None] * use(f"mlp {i}", y)

    shift, scale = (time[:, None] + w["scale_shift_table"]).unbind(1)
    patches = linear(w, "proj_out", modulated_norm(hidden, shift, scale))
    image = torch.zeros_like(x)
    for token, (rows, columns) in enumerate(slices):  # a patch is rows, columns, channels
        image[:, :, rows, columns] = patches[:, token].reshape(n, patch, patch, -1).permute(0, 3, 1, 2)
    return image
