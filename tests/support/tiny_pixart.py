"""Small random PixArts and prompts, diffusers' pipelines around them, and the network once more, slowly.

The slow one takes nothing of `harmonica` and no layer of torch or diffusers: float64 from a state dict,
heads looped over, padding left out instead of masked.
"""

import functools
import importlib.util
import math
import sys
import types
from collections.abc import Callable

import torch
from slow_dit import gelu_tanh, linear, modulated_norm, patch_slices, silu
from torch import Tensor

from harmonica.models.base import freeze
from harmonica.models.pixart.model import PixArt
from harmonica.models.text_condition import TextCondition
from harmonica.samplers import SamplerConfig
from harmonica.torchvision_ops import ensure_torchvision_imports

ensure_torchvision_imports()

from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel  # noqa: E402
from tiny_pipeline import make_vae  # noqa: E402

WIDTH, TEXT_TOKENS, TEXT_WIDTH = 24, 7, 10
SHAPES = {
    "alpha": {"sample_size": 8, "use_additional_conditions": False},
    # The pipeline tells the model its size where sample_size is 128.
    "alpha 1024": {"sample_size": 128, "patch_size": 32, "use_additional_conditions": True},
    "sigma": {
        "sample_size": 8,
        "interpolation_scale": 2,
        "use_additional_conditions": False,
        "norm_eps": 1e-4,
    },
}
FAMILY = tuple(SHAPES)
CACHEABLE = [("attn", "mlp"), ("attn", "cross", "mlp"), ("cross",), ("mlp",)]
"""What PixArt caches by default, everything, and what leaves sub-layers before the first branch."""
STEPS = 5
TIMES = torch.tensor([999, 500, 3])
Use = Callable[[str, Tensor], Tensor]
"""What the sub-layer of a name adds, before its gate, given what it computes."""


def make_transformer(kind: str, *, seed: int = 0, **more) -> PixArtTransformer2DModel:
    """float64, three blocks. No gate is small: a silent branch would make any caching right.

    The patches enter weakly, as an untrained model's latents grow and would drown the branches.
    """
    transformer = PixArtTransformer2DModel(
        **{"patch_size": 2, "num_layers": 3, "num_attention_heads": 2, **SHAPES[kind], **more},
        attention_head_dim=WIDTH // 2,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
    ).double()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        size = 0.5 if parameter.ndim == 1 or "table" in name else parameter[0].numel() ** -0.5
        size *= 0.1 if name.startswith("pos_embed") else 1.0
        torch.nn.init.normal_(parameter, std=size, generator=generator)
    return transformer.eval()


def make_pixart(kind: str, *cacheable, seed: int = 0) -> PixArt:
    """Frozen; the default kinds are cacheable where none is named."""
    settings = {"cacheable": cacheable} if cacheable else {}
    model = PixArt(make_transformer(kind, seed=seed), text_tokens=TEXT_TOKENS, **settings)
    freeze(model)
    return model


def make_batch(kind: str, n: int = 3, *, tall: bool = False, seed: int = 1) -> tuple[Tensor, TextCondition]:
    """Noise (n, 4, H, W) and prompts of differing lengths, their negatives shorter; float64.

    Args:
        tall: twice as high as wide.
    """
    generator = torch.Generator().manual_seed(seed)
    side = SHAPES[kind]["sample_size"]
    noise = torch.randn(n, 4, side, side // (1 + tall), generator=generator, dtype=torch.float64)
    texts = torch.randn(2, n, TEXT_TOKENS, TEXT_WIDTH, generator=generator, dtype=torch.float64)
    place, lengths = torch.arange(TEXT_TOKENS), torch.arange(n)[:, None]
    is_told = SHAPES[kind]["use_additional_conditions"]
    condition = TextCondition(
        embeddings=texts[0],
        mask=place < TEXT_TOKENS - 2 * lengths % TEXT_TOKENS,
        negative_embeddings=texts[1],
        negative_mask=place < 1 + lengths % TEXT_TOKENS,
        # Two pixels a latent, as the VAE of `pipeline_latents` has it.
        resolution=torch.tensor([[2.0 * side, 2.0 * noise.shape[3]]] * n) if is_told else None,
        aspect_ratio=torch.full((n, 1), 1.0 + tall) if is_told else None,
    )
    return noise, condition


def config(name: str = "ddim", **settings) -> SamplerConfig:
    return SamplerConfig(
        name=name, **{"num_inference_steps": STEPS, "guidance_scale": 3.0, "clip_sample": False} | settings
    )


def apart(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and theirs.norm() > 0
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def halve(model: PixArt, dtype: torch.dtype) -> PixArt:
    """As a loader does it."""
    for name, parameter in model.named_parameters():
        is_full = name.startswith(model.full_precision_parts)
        parameter.data = parameter.data.to(torch.float32 if is_full else dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.float()
    return model


def diffusers_arguments(condition: TextCondition) -> dict:
    """What a PixArt's own forward calls the condition."""
    return {
        "encoder_hidden_states": condition.embeddings,
        "encoder_attention_mask": condition.mask.long(),
        "added_cond_kwargs": {"resolution": condition.resolution, "aspect_ratio": condition.aspect_ratio},
    }


@functools.cache
def pipeline_class(name: str) -> type:
    """`PixArtAlphaPipeline` or `PixArtSigmaPipeline`, from their own files.

    diffusers offers them only where transformers is installed; all that these files take from there are
    the names of text encoders, which prompts embedded beforehand do without.
    """
    is_missing = importlib.util.find_spec("transformers") is None
    if is_missing:
        sys.modules["transformers"] = types.ModuleType("transformers")
        sys.modules["transformers"].__dict__.update(T5EncoderModel=object, T5Tokenizer=object)
    try:
        module = importlib.import_module(f"diffusers.pipelines.pixart_alpha.pipeline_pixart_{name}")
    finally:
        if is_missing:
            del sys.modules["transformers"]
    return getattr(module, f"PixArt{name.title()}Pipeline")


def pipeline_latents(
    kind: str, model: PixArt, scheduler: object, noise: Tensor, condition: TextCondition, **kw
):
    """(n, 4, H, W) by diffusers' own pipeline, its VAE unused but for its scale."""
    pipe = pipeline_class(kind.split()[0])(
        tokenizer=None, text_encoder=None, vae=make_vae(), transformer=model.transformer, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        negative_prompt=None,
        prompt_embeds=condition.embeddings,
        prompt_attention_mask=condition.mask.long(),
        negative_prompt_embeds=condition.negative_embeddings,
        negative_prompt_attention_mask=condition.negative_mask.long(),
        latents=noise,
        height=2 * noise.shape[2],
        width=2 * noise.shape[3],
        use_resolution_binning=False,
        output_type="latent",
        **kw,
    ).images


def _features(values: Tensor) -> Tensor:
    """Cosines and sines (n, 256) of numbers (n,)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angle = values.float()[:, None] * frequency
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=1).double()


def _attention(w: dict[str, Tensor], name: str, query: Tensor, text: Tensor, num_heads: int) -> Tensor:
    """One head after the other; (L, D) that looks at (S, D)."""
    q, k, v = (
        linear(w, f"{name}.to_q", query),
        linear(w, f"{name}.to_k", text),
        linear(w, f"{name}.to_v", text),
    )
    heads = []
    for part in torch.arange(q.shape[1]).chunk(num_heads):
        weights = torch.exp(q[:, part] @ k[:, part].T / math.sqrt(len(part)))
        heads.append((weights / weights.sum(1, keepdim=True)) @ v[:, part])
    return linear(w, f"{name}.to_out.0", torch.cat(heads, dim=1))


def slow_network(
    transformer: PixArtTransformer2DModel, x: Tensor, t: Tensor, condition: TextCondition, use: Use
) -> Tensor:
    """PixArt (n, 8, S, S) with epsilon 1e-6 in its norms."""
    w, shape = transformer.state_dict(), transformer.config
    patch, width, n = shape.patch_size, WIDTH, len(x)
    slices = patch_slices(shape.sample_size, patch)
    kernel = w["pos_embed.proj.weight"].reshape(width, -1)
    tokens = [x[:, :, rows, columns].reshape(n, -1) @ kernel.T for rows, columns in slices]
    hidden = torch.stack(tokens, dim=1) + w["pos_embed.proj.bias"] + transformer.pos_embed.pos_embed

    def embedded(name: str, values: Tensor) -> Tensor:
        inner = silu(linear(w, f"adaln_single.emb.{name}.linear_1", _features(values)))
        return linear(w, f"adaln_single.emb.{name}.linear_2", inner)

    time = embedded("timestep_embedder", t)
    if condition.resolution is not None:
        height, width_, ratio = *condition.resolution.T, condition.aspect_ratio[:, 0]
        sizes = [embedded("resolution_embedder", height), embedded("resolution_embedder", width_)]
        time = time + torch.cat([*sizes, embedded("aspect_ratio_embedder", ratio)], dim=1)
    modulation = linear(w, "adaln_single.linear", silu(time)).reshape(n, 6, width)
    inner = gelu_tanh(linear(w, "caption_projection.linear_1", condition.embeddings))
    text = linear(w, "caption_projection.linear_2", inner)

    for i in range(shape.num_layers):
        block = f"transformer_blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + w[f"{block}.scale_shift_table"]).unbind(
            1
        )
        normed = modulated_norm(hidden, shift1, scale1)
        heads = shape.num_attention_heads
        y = torch.stack([_attention(w, f"{block}.attn1", row, row, heads) for row in normed])
        hidden = hidden + gate1[:, None] * use(f"attn {i}", y)
        words = [row[mask] for row, mask in zip(text, condition.mask)]
        looks = [_attention(w, f"{block}.attn2", row, word, heads) for row, word in zip(hidden, words)]
        hidden = hidden + use(f"cross {i}", torch.stack(looks))
        y = gelu_tanh(linear(w, f"{block}.ff.net.0.proj", modulated_norm(hidden, shift2, scale2)))
        hidden = hidden + gate2[:, None] * use(f"mlp {i}", linear(w, f"{block}.ff.net.2", y))

    shift, scale = (time[:, None] + w["scale_shift_table"]).unbind(1)
    patches = linear(w, "proj_out", modulated_norm(hidden, shift, scale))
    image = torch.zeros(n, shape.out_channels, *x.shape[2:], dtype=torch.float64)
    for token, (rows, columns) in enumerate(slices):  # a patch is rows, columns, channels
        image[:, :, rows, columns] = patches[:, token].reshape(n, patch, patch, -1).permute(0, 3, 1, 2)
    return image
