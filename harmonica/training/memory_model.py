"""All of a transformer that its memory depends on, and the bytes of each thing that lives in it.

Shapes: M model rows (two a picture under guidance), L tokens, D width, S text tokens.
"""

from dataclasses import dataclass

from harmonica.core.passes import branches_per_checkpoint
from harmonica.models.base import BranchedTransformer
from harmonica.models.dit.conditioning import ROWS_AT_ONCE
from harmonica.training.sharding import sharded_layers

_SUB_LAYERS = {"DiT": ("attn", "mlp"), "PixArt": ("attn", "cross", "mlp")}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, by what holds them."""

    weights: int
    caches: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.activations + self.working


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """All of a transformer that its memory depends on."""

    kinds: tuple[str, ...]
    """Sub-layers of a block in order."""
    cacheable: tuple[str, ...]
    """Those of them that are branches."""
    layers: int
    width: int
    heads: int
    tokens: int
    text_tokens: int
    """Of one prompt; 0 without text."""
    value_bytes: int
    """Of a number inside the branches, and so in the caches."""
    hidden_bytes: int
    """Of a number in the hidden state between branches."""
    sharded_weights: int
    """Bytes of what `harmonica.training.sharding` spreads over processes."""
    other_weights: int
    """Bytes of the rest, which every process holds."""

    @classmethod
    def of(cls, model: BranchedTransformer) -> "Shape":
        """Of a model in its precision, also of one without storage (`torch.device("meta")`).

        Raises:
            ValueError: an architecture that is not known here.
        """
        shape = model.shape()
        kinds = _SUB_LAYERS.get(shape["architecture"])
        if kinds is None:
            raise ValueError(
                f"model.path holds a {shape['architecture']}: its memory is not known, only that of "
                f"{', '.join(_SUB_LAYERS)}; add its sub-layers to `_SUB_LAYERS` in "
                "harmonica/training/memory_model.py"
            )
        heads = shape["num_attention_heads"]
        full = [p for n, p in model.named_parameters() if n.startswith(model.full_precision_parts)]
        sharded = sum(p.nbytes for layer in sharded_layers(model) for p in layer.parameters())
        return cls(
            kinds=kinds,
            cacheable=tuple(shape.get("cacheable", kinds)),
            layers=shape["num_layers"],
            width=heads * shape["attention_head_dim"],
            heads=heads,
            tokens=(shape["sample_size"] // shape["patch_size"]) ** 2,
            text_tokens=shape.get("text_tokens", 0),
            value_bytes=model.dtype.itemsize,
            hidden_bytes=max([model.dtype.itemsize, *(p.dtype.itemsize for p in full)]),
            sharded_weights=sharded,
            other_weights=sum(p.nbytes for p in model.parameters()) - sharded,
        )

    @property
    def num_branches(self) -> int:
        return self.layers * len(self.cacheable)

    def weights(self, processes: int = 1) -> int:
        """On each of the processes that the model is sharded over."""
        return self.sharded_weights // processes + self.other_weights

    def hidden(self, rows: int) -> int:
        """One hidden state of M rows."""
        return rows * self.tokens * self.width * self.hidden_bytes

    def value(self, rows: int) -> int:
        """One y of M rows."""
        return rows * self.tokens * self.width * self.value_bytes

    def prepared(self, rows: int, num_steps: int) -> int:
        """What a trajectory of M rows makes ahead: keys and values of prompts, a DiT's modulations."""
        if self.text_tokens:
            return self.layers * rows * 2 * self.text_tokens * self.width * self.value_bytes
        return min(num_steps, max(1, ROWS_AT_ONCE // rows)) * self.modulations(rows)

    def modulations(self, rows: int) -> int:
        """Of all blocks at one step."""
        return self.layers * rows * 6 * self.width * self.value_bytes

    def working(self, rows: int, *, backward: bool = False) -> int:
        """What is alive at the worst moment of a branch, inside an MLP, and modulations made for a step."""
        modulations = self.modulations(rows) if self.text_tokens else 0
        if backward:
            return modulations + 5 * self.hidden(rows)
        return modulations + 2 * self.hidden(rows) + 10 * self.value(rows)

    def inside(self, kind: str, rows: int) -> int:
        """What the backward through one sub-layer needs of M rows, its y aside."""
        logsumexp, norm = 4 * rows * self.heads * self.tokens, 8 * rows * self.tokens
        if kind == "cross":  # query and result
            return 2 * self.value(rows) + logsumexp
        # Before the norm; then query, key, value and result, or what enters the activation function.
        own = self.hidden(rows) + 4 * self.value(rows) + norm
        return own + logsumexp if kind == "attn" else own

    def activations(self, rows: int, *, checkpointing: bool = False) -> int:
        """What the backward through a soft pass keeps of M rows, caches aside."""
        block = sum(self.inside(kind, rows) for kind in self.kinds) + len(self.cacheable) * self.value(rows)
        if checkpointing:
            size = branches_per_checkpoint(self.num_branches)
            groups = -(-self.num_branches // size)
            return groups * self.hidden(rows) + block * size // len(self.cacheable)
        # No score reaches what lies before the first branch's y. The last hidden state is the head's.
        first = self.kinds.index(self.cacheable[0])
        before = sum(self.inside(kind, rows) for kind in self.kinds[: first + 1])
        return self.layers * block - before + self.hidden(rows)
