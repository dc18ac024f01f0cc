"""The memory model of a transformer.

It gives the bytes of weights, activations and caches.

They are computed from the shape of the model, without a GPU.
Shapes: M model rows (two a picture under guidance), L tokens, D width, S text tokens.
"""

from dataclasses import dataclass

from harmonica.core.recompute import GROUPS_OF_SEGMENT, branches_per_checkpoint
from harmonica.models.base import BranchedTransformer
from harmonica.models.dit.conditioning import ROWS_AT_ONCE
from harmonica.training.sharding import sharded_layers

_SUB_LAYERS = {"DiT": ("attn", "mlp"), "PixArt": ("attn", "cross", "mlp")}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of memory by purpose."""

    weights: int
    caches: int
    activations: int
    working: int
    host: int = 0
    """Bytes in the host's memory."""

    @property
    def total(self) -> int:
        """Return the sum of all parts on the device in bytes."""
        return self.weights + self.caches + self.activations + self.working


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes of a transformer that determine its memory."""

    kinds: tuple[str, ...]
    """The sub-layers of a block, in order."""
    cacheable: tuple[str, ...]
    """The sub-layers that are branches."""
    layers: int
    width: int
    heads: int
    tokens: int
    text_tokens: int
    """Number of tokens of one prompt; 0 without text."""
    value_bytes: int
    """Bytes of one number inside the branches and the caches."""
    hidden_bytes: int
    """Bytes of one number of the hidden state between branches."""
    sharded_weights: int
    """Bytes of the weights that `harmonica.training.sharding` spreads over processes."""
    other_weights: int
    """Bytes of the other weights, which every process holds."""
    are_one_branch: bool = False
    """Whether all blocks are one branch, as by default of a transformer that is recorded in a pipeline."""

    @classmethod
    def of(cls, model: BranchedTransformer) -> "Shape":
        """Return the shape of a model, which may lie on `torch.device("meta")`.

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
        """Return the number of branches that can be cached."""
        return 1 if self.are_one_branch else self.layers * len(self.cacheable)

    @property
    def num_segments(self) -> int:
        """Return the number of segments of a whole step (`harmonica.core.segments`)."""
        if self.are_one_branch:
            return 1
        uncached = any(kind not in self.cacheable for kind in self.kinds)
        return self.layers + 1 if uncached else 1

    def weights(self, processes: int = 1) -> int:
        """Return the bytes of weights on each process that the model is sharded over."""
        return self.sharded_weights // processes + self.other_weights

    def hidden(self, rows: int) -> int:
        """Return the bytes of one hidden state of M rows."""
        return rows * self.tokens * self.width * self.hidden_bytes

    def value(self, rows: int) -> int:
        """Return the bytes of one branch output y of M rows."""
        return rows * self.tokens * self.width * self.value_bytes

    def prepared(self, rows: int, num_steps: int) -> int:
        """Return the bytes that a trajectory of M rows prepares.

        These are prompts' keys and values, and modulations.
        """
        if self.text_tokens:
            return self.layers * rows * 2 * self.text_tokens * self.width * self.value_bytes
        return min(num_steps, max(1, ROWS_AT_ONCE // rows)) * self.modulations(rows)

    def modulations(self, rows: int) -> int:
        """Return the bytes of the modulations of all blocks at one step."""
        return self.layers * rows * 6 * self.width * self.value_bytes

    def working(self, rows: int, *, backward: bool = False) -> int:
        """Return the peak bytes inside a branch, and of a step's modulations.

        The branch with the peak is the MLP's.
        """
        modulations = self.modulations(rows) if self.text_tokens else 0
        if backward:
            return modulations + (10 if self.are_one_branch else 5) * self.hidden(rows)
        return modulations + 2 * self.hidden(rows) + 10 * self.value(rows)

    def inside(self, kind: str, rows: int) -> int:
        """Return the bytes that a sub-layer's backward keeps of M rows.

        Its output y is not counted.
        """
        logsumexp, norm = 4 * rows * self.heads * self.tokens, 8 * rows * self.tokens
        if kind == "cross":  # query and result
            return 2 * self.value(rows) + logsumexp
        # Before the norm; then query, key, value and result, or what enters the activation function.
        own = self.hidden(rows) + 4 * self.value(rows) + norm
        return own + logsumexp if kind == "attn" else own

    def of_step(self, rows: int, *, checkpointing: bool = False, segments: bool = False) -> int:
        """Return the bytes that a trajectory's backward keeps of a computed step.

        The step has M rows. The values of its branches are among them; those of segments are not.
        """
        if segments:
            if checkpointing:
                return self._groups_of_segments * self.hidden(rows)
            # A pipeline's transformer also keeps what its own forward gates and adds.
            between = 2 * self.hidden(rows) if self.are_one_branch else 0
            return self.layers * (between + sum(self.inside(kind, rows) for kind in self.kinds))
        if checkpointing:
            return self._of_groups(rows) + self.num_branches * self.value(rows)
        return self.layers * self._of_block(rows)

    @property
    def _groups_of_segments(self) -> int:
        """Return how many groups of a step are recomputed.

        In a pipeline each block is one.
        """
        return self.layers if self.are_one_branch else max(GROUPS_OF_SEGMENT, self.num_segments)

    def _of_block(self, rows: int) -> int:
        """Return the bytes that a block's backward keeps, with its branches' values."""
        return sum(self.inside(kind, rows) for kind in self.kinds) + len(self.cacheable) * self.value(rows)

    def _of_groups(self, rows: int) -> int:
        """Return the bytes of the hidden states before recomputed groups."""
        return -(-self.num_branches // branches_per_checkpoint(self.num_branches)) * self.hidden(rows)

    def of_group(self, rows: int, *, segments: bool = False) -> int:
        """Return the bytes that the backward of a group keeps once it is computed again."""
        if segments:
            return self.of_step(rows, segments=True) // self._groups_of_segments
        size = branches_per_checkpoint(self.num_branches)
        return self._of_block(rows) * size // len(self.cacheable)

    def activations(self, rows: int, *, checkpointing: bool = False) -> int:
        """Return the bytes that a soft pass's backward keeps of M rows.

        The caches are not counted.
        """
        if self.are_one_branch:  # no score reaches inside of it
            return self.hidden(rows)
        block = self._of_block(rows)
        if checkpointing:
            return self._of_groups(rows) + self.of_group(rows)
        # No score reaches what lies before the first branch's y. The last hidden state is the head's.
        first = self.kinds.index(self.cacheable[0])
        before = sum(self.inside(kind, rows) for kind in self.kinds[: first + 1])
        return self.layers * block - before + self.hidden(rows)
