"""The sub-layers of diffusers' PixArt blocks as branches, and what they need of the step and the text.

Shapes: N batch, L tokens, D width, S text tokens, G blocks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harmonica.models.base import Branch, merge_of
from harmonica.models.step_conditionings import StepConditionings

Kind = Literal["attn", "cross", "mlp"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Sub-layers of a block, in order."""


@dataclass(frozen=True, slots=True)
class ProjectedText:
    """All that a step needs of its prompts: the same at every step of a trajectory."""

    keys_values: list[tuple[Tensor, Tensor]] = field(repr=False)
    """Of each block's cross-attention, both (N, heads, S, D / heads)."""
    bias: Tensor = field(repr=False)
    """(N, 1, 1, S) added to attention scores: padding is not looked at."""
    sizes: dict[str, Tensor | None] = field(repr=False)
    """`added_cond_kwargs` of PixArt-alpha at 1024; None in the others."""


@dataclass(frozen=True, slots=True)
class PixArtConditioning:
    """Modulations of one step, made once for every block, and the prompts."""

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
    """Of a trajectory's steps, from what makes them of timesteps (N,) and the prompts."""

    def make(some: Sequence[float]) -> list[PixArtConditioning]:
        return [make_one(torch.full((len(text.bias),), t, device=text.bias.device), text) for t in some]

    return StepConditionings(make, timesteps)


class ModulatedBranch(Branch):
    """Self-attention (offset 0) or MLP (offset 3) of one block; the offset is into the six modulations."""

    def __init__(self, index: int, kind: Literal["attn", "mlp"], block: Any, macs: int) -> None:
        self.name, self.macs = f"{kind} {index}", macs
        self.index, self.kind, self.block = index, kind, block
        self.offset = 0 if kind == "attn" else 3

    def compute(self, hidden_NLD: Tensor, conditioning: PixArtConditioning) -> Tensor:
        block, o = self.block, self.offset
        norm, layer = (block.norm1, block.attn1) if self.kind == "attn" else (block.norm2, block.ff)
        shift, scale = conditioning.blocks[self.index, :, o : o + 2].split(1, dim=1)
        return layer(torch.addcmul(shift, norm(hidden_NLD), scale).to(shift.dtype))

    def merge(self, hidden_NLD: Tensor, y_NLD: Tensor, conditioning: PixArtConditioning) -> Tensor:
        return torch.addcmul(hidden_NLD, self.gate(conditioning), y_NLD)

    def merge_(self, hidden_NLD: Tensor, y_NLD: Tensor, conditioning: PixArtConditioning) -> Tensor:
        return hidden_NLD.addcmul_(self.gate(conditioning), y_NLD)

    def gate(self, conditioning: PixArtConditioning) -> Tensor:
        o = self.offset + 2
        return conditioning.blocks[self.index, :, o : o + 1]


class CrossAttention(Branch):
    """Cross-attention of one block to the text: it has neither norm, modulation nor gate."""

    kind: Kind = "cross"

    def __init__(self, index: int, block: Any, macs: int) -> None:
        self.name, self.macs = f"cross {index}", macs
        self.index, self.block = index, block

    def compute(self, hidden_NLD: Tensor, conditioning: PixArtConditioning) -> Tensor:
        attention, text = self.block.attn2, conditioning.text
        key, value = text.keys_values[self.index]
        query_NLD = attention.to_q(hidden_NLD.to(key.dtype))
        if attention.norm_q is not None:  # Sana's; no PixArt has one
            query_NLD = attention.norm_q(query_NLD)
        query = split_heads(query_NLD, attention.heads)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=text.bias)
        y_NLD = found.transpose(1, 2).flatten(2)
        for layer in attention.to_out:
            y_NLD = layer(y_NLD)
        return y_NLD

    def merge(self, hidden_NLD: Tensor, y_NLD: Tensor, conditioning: PixArtConditioning) -> Tensor:
        return hidden_NLD + y_NLD

    def merge_(self, hidden_NLD: Tensor, y_NLD: Tensor, conditioning: PixArtConditioning) -> Tensor:
        return hidden_NLD.add_(y_NLD)


SubLayer = ModulatedBranch | CrossAttention


def sub_layers(transformer: Any, tokens: int, text_tokens: int) -> Iterator[SubLayer]:
    """All of them in order, with their MACs."""
    width = transformer.inner_dim
    for i, block in enumerate(transformer.transformer_blocks):
        own, text = block.attn1, block.attn2
        projections = linear_macs(own.to_q, own.to_k, own.to_v, own.to_out)
        yield ModulatedBranch(i, "attn", block, tokens * projections + 2 * tokens**2 * width)
        projections = linear_macs(text.to_q, text.to_out)
        yield CrossAttention(i, block, tokens * projections + 2 * tokens * text_tokens * width)
        yield ModulatedBranch(i, "mlp", block, tokens * linear_macs(block.ff))


class LeadingBranch(Branch):
    """A branch, and the sub-layers up to the next one: these run whenever it is merged, reused or not."""

    def __init__(self, branch: Branch, always: Sequence[Branch]) -> None:
        self.name, self.macs = branch.name, branch.macs
        self.branch, self.always = branch, always

    def compute(self, hidden_NLD: Tensor, conditioning: Any) -> Tensor:
        return self.branch.compute(hidden_NLD, conditioning)

    def merge(self, hidden_NLD: Tensor, y_NLD: Tensor, conditioning: Any) -> Tensor:
        return self.post_branch(self.branch.merge(hidden_NLD, y_NLD, conditioning), conditioning)

    def merge_(self, hidden_NLD: Tensor, y_NLD: Tensor, conditioning: Any) -> Tensor:
        return self.post_branch(self.branch.merge_(hidden_NLD, y_NLD, conditioning), conditioning)

    def gate(self, conditioning: Any) -> Tensor | None:
        return self.branch.gate(conditioning)

    @property
    def has_post_branch(self) -> bool:
        return True

    def post_branch(self, hidden_NLD: Tensor, conditioning: Any) -> Tensor:
        return run_all(self.always, hidden_NLD, conditioning)


def arrange(
    layers: Iterable[SubLayer], cacheable: tuple[Kind, ...]
) -> tuple[list[Branch], list[Branch], int]:
    """Sub-layers before the first branch, the branches with what always runs behind each, and MACs of all
    that always runs.

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


def run_all(layers: Sequence[Branch], hidden_NLD: Tensor, conditioning: Any) -> Tensor:
    """The hidden state behind `layers`, each computed."""
    for index, layer in enumerate(layers):
        y_NLD = layer.compute(hidden_NLD, conditioning)
        hidden_NLD = merge_of(layer, index)(hidden_NLD, y_NLD, conditioning)
    return hidden_NLD


def split_heads(x_NLD: Tensor, heads: int) -> Tensor:
    """(N, heads, L, D / heads)."""
    return x_NLD.unflatten(2, (heads, -1)).transpose(1, 2)


def linear_macs(*modules: nn.Module) -> int:
    """Of all linear layers inside, for one token."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(layer.in_features * layer.out_features for layer in layers)
