"""Tell a sub-module's kind from its name, or from what its class declares.

The names are those of diffusers' blocks: `attn`, `attn1`, `attention`, `self_attn`; `attn2`, `cross_attn`;
`ff`, `ffn`, `mlp`, `feed_forward`, `img_mlp`, `ff_context`. A class that needs nothing else is in no table.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from harmonica.validation.settings import require

RecordedKind = Literal["attn", "cross", "mlp", "single", "blocks"]
KINDS: tuple[RecordedKind, ...] = ("attn", "cross", "mlp", "single")
"""Attention; cross-attention; feed-forward; attention and feed-forward that end in one projection."""
BLOCKS: Final = "blocks"
"""Alone in place of these: all blocks are one branch (`block_stack`)."""

ARCHITECTURE_KEY = "diffusers_class"
"""Key of an artifact's model that says that its branches were found by recording."""


def are_all_blocks(cacheable: Sequence[str]) -> bool:
    """Return whether all blocks are one branch."""
    return tuple(cacheable) == (BLOCKS,)


def check_kinds(cacheable: Sequence[str], field_name: str = "cacheable") -> None:
    """Refuse kinds of branches that there are not.

    Raises:
        SettingError: with what may be given.
    """
    are_kinds = bool(cacheable) and not set(cacheable) - set(KINDS)
    cure = f"give some of {', '.join(KINDS)}, or {BLOCKS} alone"
    require(are_all_blocks(cacheable) or are_kinds, field_name, cacheable, cure)


_CROSS = re.compile(r"attn2|cross_?att|crossattn|_to_.*attn|text_?cross")
_ATTENTION = re.compile(r"attn|attention")
_FEED_FORWARD = re.compile(r"(^|_)(ff|ffn|mlp|feed_?forward|moe|experts?|conv_ff)(_|\d|$)")
_OTHER = re.compile(r"norm|_ln$|mod|embed|gate|scale|drop|act")


class RefusedTransformer(ValueError):
    """Raised for a class that no plan can be put on; says why."""


@dataclass(frozen=True)
class Declaration:
    """Declares what the names of a class's branches do not tell."""

    kinds: Mapping[str, RecordedKind | None] = field(default_factory=dict)
    """The kind of sub-modules by the last part of their name; None is no branch."""
    refused: str = ""
    """Why the class has no plan; the sentence that users read."""
    filled: str = ""
    """The forward's argument that holds keys and values. Calls before the steps fill it (mode "write")."""


DECLARATIONS: dict[str, Declaration] = {
    # attn2 of the first blocks of SD3.5-medium is a second self-attention, beside the joint one.
    "SD3Transformer2DModel": Declaration({"attn2": "attn"}),
    # The block computes its feed-forward itself, from three linear layers.
    "PRXTransformer2DModel": Declaration({"down_proj": "mlp"}),
    # Blocks of a trunk over residues: attention with a pair bias, and a gated feed-forward.
    "RFD4ProteinaTransformer": Declaration({"mhba": "attn", "transition": "mlp"}),
    # A call for each picture that is edited.
    "GlmImageTransformer2DModel": Declaration(filled="kv_caches"),
    "T5FilmDecoder": Declaration({"DenseReluDense": "mlp"}),
    "AnyFlowFARTransformer3DModel": Declaration(
        refused="it draws a video in chunks, and each chunk's attention fills a cache of keys and values "
        "that later chunks read: a reused attention would leave it empty"
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Declaration(
        refused="it refines a video in blocks, and each block's attention fills a cache of keys and values "
        "that later blocks read: a reused attention would leave it empty"
    ),
    "WanAnimate2Transformer3DModel": Declaration(
        refused="its attention is flex_attention, whose multiply-accumulates torch does not count, and reads "
        "keys and values that a pass over the reference has to fill before the steps"
    ),
    "Kandinsky6SRTransformer3DModel": Declaration(
        refused="its attention is flex_attention, whose multiply-accumulates torch does not count"
    ),
    "MiniMaxMusic3RVQDepthDecoder": Declaration(
        refused="it decodes codes and has no denoising steps, between which values could be reused"
    ),
}


def declaration_of(transformer: object) -> Declaration:
    """Return the declaration of the transformer's class, empty if it has none."""
    return DECLARATIONS.get(type(transformer).__name__, Declaration())


def is_no_step(transformer: object, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call fills a cache before the steps, and so is none of them."""
    caches: Any = kwargs.get(declaration_of(transformer).filled)
    return caches is not None and caches[0].mode == "write"


def kind_of(name: str, declared: Declaration) -> RecordedKind | None:
    """Return the kind of a sub-module, or None if it is no branch by its name.

    Args:
        name: the last part of the sub-module's path.
    """
    if name in declared.kinds:
        return declared.kinds[name]
    if _OTHER.search(name):
        return None
    if _CROSS.search(name):
        return "cross"
    if _ATTENTION.search(name):
        return "attn"
    return "mlp" if _FEED_FORWARD.search(name) else None
