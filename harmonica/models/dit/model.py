"""DiT (Peebles and Xie 2023, arXiv 2212.09748) on timm's layers, as branches.

Parameter names are those of the public `.pt` checkpoints, so these load as they are.
Shapes: N batch, C channels, H W image, L tokens, D width, F frequencies.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from types import ModuleType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harmonica.models.base import Branch, BranchedTransformer, Macs, unpatchify
from harmonica.models.dit.conditioning import ROWS_AT_ONCE, DiTConditioning
from harmonica.models.dit.config import DiTConfig
from harmonica.models.step_conditionings import StepConditionings
from harmonica.torchvision_ops import ensure_torchvision_imports

NUM_FREQUENCIES = 256
_NORM_EPS = 1e-6  # of the norms before attention and in the final layer, in the public code and diffusers


def _timm_layers() -> ModuleType:
    """Return the module `timm.layers`."""
    ensure_torchvision_imports()  # first: importing timm imports torchvision
    from timm import layers  # not at the top, since it takes as long as importing torch

    return layers


def sincos_position_embedding(hidden_size: int, grid_size: int) -> Tensor:
    """Return fixed 2-D sine-cosine positions (1, L, D): x in the first half of D."""
    frequency = 1.0 / 10000 ** (torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4))
    angle = torch.outer(torch.arange(grid_size, dtype=torch.float64), frequency)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, D/2)
    x = axis.repeat(grid_size, 1)
    y = axis.repeat_interleave(grid_size, dim=0)
    return torch.cat([x, y], dim=1).float()[None]


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the timestep, then a two-layer MLP."""

    def __init__(self, hidden_size: int, downscale_freq_shift: int) -> None:
        super().__init__()
        self.downscale_freq_shift = downscale_freq_shift
        self.mlp = nn.Sequential(
            nn.Linear(NUM_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, timestep_N: Tensor) -> Tensor:
        """Return embeddings (N, D) of timesteps (N,)."""
        half = NUM_FREQUENCIES // 2
        # float32 whatever the model's precision: this is where checkpoints were trained and recorded.
        exponent = torch.arange(half, dtype=torch.float32, device=timestep_N.device)
        frequency_F = torch.exp(-math.log(10000) * exponent / (half - self.downscale_freq_shift))
        angle_NF = timestep_N[:, None].float() * frequency_F
        features = torch.cat([angle_NF.cos(), angle_NF.sin()], dim=1)
        embedding_ND: Tensor = self.mlp(features.to(next(self.mlp.parameters()).dtype))
        return embedding_ND


class LabelEmbedder(nn.Module):
    """Class table; its last row is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, label_N: Tensor) -> Tensor:
        """Return embeddings (N, D) of labels (N,)."""
        embedding_ND: Tensor = self.embedding_table(label_N)
        return embedding_ND


def modulate(x_NLD: Tensor, shift_ND: Tensor, scale_ND: Tensor) -> Tensor:
    """Apply adaLN's modulation: x * (1 + scale) + shift."""
    return torch.addcmul(shift_ND[:, None], x_NLD, 1 + scale_ND[:, None])


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by adaLN-Zero."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        layers = _timm_layers()
        self.attn = layers.Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.mlp = layers.Mlp(
            hidden_size,
            4 * hidden_size,
            act_layer=partial(nn.GELU, approximate="tanh"),
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def modulations(self, silu_c_ND: Tensor) -> tuple[Tensor, ...]:
        """Return six (N, D) from silu(c), which is computed once for all blocks."""
        six: tuple[Tensor, ...] = self.adaLN_modulation[1](silu_c_ND).chunk(6, dim=1)
        return six


class FinalLayer(nn.Module):
    """Modulated norm and projection to patches."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def modulations(self, silu_c_ND: Tensor) -> tuple[Tensor, ...]:
        """Return shift and scale (N, D) from silu(c)."""
        both: tuple[Tensor, ...] = self.adaLN_modulation[1](silu_c_ND).chunk(2, dim=1)
        return both


class DiTBranch(Branch):
    """Attention or MLP of one block; `offset` is into the six modulations."""

    def __init__(
        self, index: int, kind: Literal["attn", "mlp"], layer: nn.Module, macs: int, norm_eps: float
    ) -> None:
        self.name, self.kind, self.index, self.layer, self.macs = f"{kind} {index}", kind, index, layer, macs
        self.offset = 0 if kind == "attn" else 3
        self.norm_eps = norm_eps

    def inputs(self, conditioning: DiTConditioning) -> tuple[Tensor, ...]:
        return conditioning.blocks[self.index][self.offset : self.offset + 2]

    def run(self, hidden_NLD: Tensor, *inputs: Tensor) -> Tensor:
        shift, scale = inputs
        normed = F.layer_norm(hidden_NLD, hidden_NLD.shape[-1:], eps=self.norm_eps)
        output_NLD: Tensor = self.layer(modulate(normed, shift, scale).to(shift.dtype))
        return output_NLD

    def gate(self, conditioning: DiTConditioning) -> Tensor:
        return conditioning.blocks[self.index][self.offset + 2][:, None]


class DiT(BranchedTransformer):
    """Class-conditional Diffusion Transformer with adaLN-Zero blocks.

    In half precision, patches, positions, the residual stream and the last layer stay in float32: what
    SDT compares, a student a few parts in a thousand away from its teacher, would drown in their rounding.
    """

    full_precision_parts = ("x_embedder.", "pos_embed", "final_layer.")

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.config = config
        self.in_channels, self.out_channels = config.in_channels, config.out_channels
        self.sample_size, self.num_classes = config.sample_size, config.num_embeds_ada_norm
        self.x_embedder = _timm_layers().PatchEmbed(config.sample_size, patch, config.in_channels, width)
        self.t_embedder = TimestepEmbedder(width, config.downscale_freq_shift)
        self.y_embedder = LabelEmbedder(config.num_embeds_ada_norm, width)
        self.register_buffer("pos_embed", sincos_position_embedding(width, config.sample_size // patch))
        blocks = [DiTBlock(width, config.num_attention_heads) for _ in range(config.num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(width, patch, config.out_channels)
        tokens = config.num_tokens
        attention_macs = 4 * tokens * width**2 + 2 * tokens**2 * width
        self.branches = []
        for i, block in enumerate(blocks):
            self.branches.append(DiTBranch(i, "attn", block.attn, attention_macs, _NORM_EPS))
            self.branches.append(DiTBranch(i, "mlp", block.mlp, 8 * tokens * width**2, config.norm_eps))

    def prepare(self, condition_N: Tensor, timesteps: Sequence[float]) -> Sequence[DiTConditioning]:
        at_once = max(1, ROWS_AT_ONCE // len(condition_N))
        return StepConditionings(partial(self.conditionings, condition_N), timesteps, at_once=at_once)

    def embed(
        self, sample_NCHW: Tensor, timestep_N: Tensor, condition_N: Tensor | DiTConditioning
    ) -> tuple[Tensor, DiTConditioning]:
        positions = cast(Tensor, self.pos_embed)
        hidden = self.as_residual(self.x_embedder(sample_NCHW.to(positions.dtype)) + positions)
        if isinstance(condition_N, DiTConditioning):
            return hidden, condition_N
        return hidden, self._modulations(timestep_N, condition_N)

    def conditionings(self, label_N: Tensor, timesteps: Sequence[float]) -> list[DiTConditioning]:
        """Compute the conditionings of the rows at each of some timesteps."""
        n = len(label_N)
        # Filled by the device itself: a list would be copied from the host, which no captured step may do.
        timestep_K = torch.cat([torch.full((n,), each, device=label_N.device) for each in timesteps])
        together = self._modulations(timestep_K, label_N.repeat(len(timesteps)))
        return [together.rows(slice(first, first + n)) for first in range(0, len(timestep_K), n)]

    def _modulations(self, timestep_N: Tensor, label_N: Tensor) -> DiTConditioning:
        c_ND = F.silu(self.t_embedder(timestep_N) + self.y_embedder(label_N))
        blocks = [block.modulations(c_ND) for block in cast(Iterable[DiTBlock], self.blocks)]
        final = self.final_layer.modulations(c_ND.to(cast(Tensor, self.pos_embed).dtype))
        return DiTConditioning(blocks, final)

    def head(self, hidden_NLD: Tensor, conditioning: DiTConditioning) -> Tensor:
        hidden_NLD = hidden_NLD.to(conditioning.final[0].dtype)
        normed = F.layer_norm(hidden_NLD, hidden_NLD.shape[-1:], eps=_NORM_EPS)
        patches = self.final_layer.linear(modulate(normed, *conditioning.final))
        side = self.sample_size // self.config.patch_size
        return unpatchify(patches, (side, side), self.config.patch_size)

    @property
    def value_shape(self) -> tuple[int, int]:
        return self.config.num_tokens, self.config.hidden_size

    def guided_condition(self, condition_N: Tensor) -> Tensor:
        return torch.cat([condition_N, torch.full_like(condition_N, self.num_classes)])

    def macs(self) -> Macs:
        c, width, tokens = self.config, self.config.hidden_size, self.config.num_tokens
        patch = c.patch_size**2 * width * tokens
        modulation = (6 * c.num_layers + 2) * width**2
        timestep = NUM_FREQUENCIES * width + width**2
        rest = patch * (c.in_channels + c.out_channels) + modulation + timestep
        return Macs(tuple(branch.macs for branch in self.branches), rest)

    def shape(self) -> dict[str, Any]:
        return {"architecture": "DiT", **asdict(self.config)}

    def initialize(self, generator: torch.Generator | None = None, *, zero: bool = True) -> None:
        """Initialise as in the public code; `zero=False` randomises what that zeroes.

        At zero gates and outputs every branch is silent, so tests of caching on random weights
        would pass vacuously: they ask for `zero=False`.
        """
        self.recorded_fingerprint = None
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                nn.init.zeros_(parameter)
            elif "embedding_table" in name or "t_embedder" in name:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif zero and ("adaLN_modulation" in name or "final_layer.linear" in name):
                nn.init.zeros_(parameter)
            else:
                flat = parameter.data.reshape(parameter.shape[0], -1)
                nn.init.xavier_uniform_(flat, generator=generator)
        if not zero:
            for name, parameter in self.named_parameters():
                if "embedding_table" in name or "adaLN_modulation" in name:
                    nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5, generator=generator)
