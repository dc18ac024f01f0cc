"""The sub-layers of diffusers' PixArt blocks as branches.

Shapes: N batch, L tokens, D width, S text tokens, G blocks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harmonica.models.base import Branch
from harmonica.models.step_conditionings import StepConditionings

Kind = Literal["attn", "cross", "mlp"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Sub-layers of a block, in order."""


@dataclass(frozen=True, slots=True)
class ProjectedText:
    """Keys, values and mask of the prompts: the same at every step."""

    keys_values: list[tuple[Tensor, Tensor]] = field(repr=False)
    """Keys and values of each block's cross-attention, both (N, heads, S, D / heads)."""
    bias: Tensor = field(repr=False)
    """(N, 1, 1, S) added to attention scores: masks the padding."""
    sizes: dict[str, Tensor | None] = field(repr=False)
    """`added_cond_kwargs` of PixArt-alpha at 1024; None in the others."""


@dataclass(frozen=True, slots=True)
class PixArtConditioning:
    """Modulations of one step for all blocks, and the prompts."""

    blocks: Tensor = field(repr=False)
    """(G, N, 6, D): shift, 1 + scale, gate of self-attention, then of the MLP."""
    final: tuple[Tensor, Tensor] = field(repr=False)
    """Shift and 1 + scale (N, 1, D) of the output."""
    text: ProjectedText
    grid: tuple[int, int] = (0, 0)
    """Patches along height and width."""


def step_conditionings(
    text: ProjectedText,
    timesteps: Sequence[float],
    make_one: Callable[[Tensor, ProjectedText], PixArtConditioning],
) -> StepConditionings[PixArtConditioning]:
    """Return the conditioning of every step, each computed by `make_one`."""

    def make(some: Sequence[float]) -> list[PixArtConditioning]:
        return [make_one(torch.full((len(text.bias),), t, device=text.bias.device), text) for t in some]

    return StepConditionings(make, timesteps)


class ModulatedBranch(Branch):
    """Self-attention or MLP of one block; `offset` is into the six modulations."""

    def __init__(self, index: int, kind: Literal["attn", "mlp"], block: Any, macs: int) -> None:
        self.name, self.macs = f"{kind} {index}", macs
        self.index, self.kind, self.block = index, kind, block
        self.offset = 0 if kind == "attn" else 3

    def inputs(self, conditioning: PixArtConditioning) -> tuple[Any, ...]:
        o = self.offset
        return tuple(conditioning.blocks[self.index, :, o : o + 2].split(1, dim=1))

    def run(self, hidden_NLD: Tensor, *inputs: Any) -> Tensor:
        block, (shift, scale) = self.block, inputs
        norm, layer = (block.norm1, block.attn1) if self.kind == "attn" else (block.norm2, block.ff)
        output_NLD: Tensor = layer(torch.addcmul(shift, norm(hidden_NLD), scale).to(shift.dtype))
        return output_NLD

    def gate(self, conditioning: PixArtConditioning) -> Tensor:
        o = self.offset + 2
        return conditioning.blocks[self.index, :, o : o + 1]


class CrossAttention(Branch):
    """Cross-attention of one block, which has no norm, modulation or gate."""

    kind: Kind = "cross"

    def __init__(self, index: int, block: Any, macs: int) -> None:
        self.name, self.macs = f"cross {index}", macs
        self.index, self.block = index, block

    def inputs(self, conditioning: PixArtConditioning) -> tuple[Tensor, ...]:
        return (*conditioning.text.keys_values[self.index], conditioning.text.bias)

    def run(self, hidden_NLD: Tensor, *inputs: Tensor) -> Tensor:
        attention, (key, value, bias) = self.block.attn2, inputs
        query_NLD = attention.to_q(hidden_NLD.to(key.dtype))
        if attention.norm_q is not None:  # Sana's; no PixArt has one
            query_NLD = attention.norm_q(query_NLD)
        query = split_heads(query_NLD, attention.heads)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        y_NLD = found.transpose(1, 2).flatten(2)
        for layer in attention.to_out:
            y_NLD = layer(y_NLD)
        return y_NLD


SubLayer = ModulatedBranch | CrossAttention


def sub_layers(transformer: Any, tokens: int, text_tokens: int) -> Iterator[SubLayer]:
    """Yield all sub-layers in order, with their MACs."""
    width = transformer.inner_dim
    for i, block in enumerate(transformer.transformer_blocks):
        own, text = block.attn1, block.attn2
        projections = linear_macs(own.to_q, own.to_k, own.to_v, own.to_out)
        yield ModulatedBranch(i, "attn", block, tokens * projections + 2 * tokens**2 * width)
        projections = linear_macs(text.to_q, text.to_out)
        yield CrossAttention(i, block, tokens * projections + 2 * tokens * text_tokens * width)
        yield ModulatedBranch(i, "mlp", block, tokens * linear_macs(block.ff))


class LeadingBranch(Branch):
    """A branch with the uncached sub-layers after it, which run at every merge."""

    def __init__(self, branch: Branch, always: Sequence[Branch]) -> None:
        self.name, self.kind, self.macs = branch.name, branch.kind, branch.macs
        self.branch, self._always = branch, always

    def inputs(self, conditioning: Any) -> tuple[Any, ...]:
        return self.branch.inputs(conditioning)

    def run(self, hidden_NLD: Tensor, *inputs: Any) -> Tensor:
        return self.branch.run(hidden_NLD, *inputs)

    def gate(self, conditioning: Any) -> Tensor | None:
        return self.branch.gate(conditioning)

    @property
    def always(self) -> Sequence[Branch]:
        return self._always

    @property
    def alone(self) -> Branch:
        return self.branch


def arrange(
    layers: Iterable[SubLayer], cacheable: tuple[Kind, ...]
) -> tuple[list[Branch], list[Branch], int]:
    """Divide sub-layers into branches and those that always run.

    Returns:
        Sub-layers before the first branch; the branches, each with the uncached sub-layers after it; and
        the MACs of all uncached sub-layers.

    Raises:
        ValueError: no such kind.
    """
    if not cacheable or len(set(cacheable)) < len(cacheable) or set(cacheable) - set(KINDS):
        raise ValueError(f"model.cacheable is {cacheable!r}: give some of {', '.join(KINDS)}, each once")
    before: list[Branch] = []
    groups: list[list[Branch]] = []
    uncached_macs = 0
    for layer in layers:
        if layer.kind in cacheable:
            groups.append([layer])
        else:
            (groups[-1] if groups else before).append(layer)
            uncached_macs += layer.macs
    return before, [LeadingBranch(first, rest) if rest else first for first, *rest in groups], uncached_macs


def split_heads(x_NLD: Tensor, heads: int) -> Tensor:
    """Reshape to (N, heads, L, D / heads)."""
    x_NLHK: Tensor = x_NLD.unflatten(2, (heads, -1))
    return x_NLHK.transpose(1, 2)


def linear_macs(*modules: nn.Module) -> int:
    """Return the MACs of all linear layers inside, for one token."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(layer.in_features * layer.out_features for layer in layers)
