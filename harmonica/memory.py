"""Expected memory of router training and of sampling, from a model's shape.

    python -m harmonica.memory                                            # a table for the public models
    python -m harmonica.memory pixart-sigma-2048 --batch-size 8 --micro-batch-size 1 --processes 4

In bytes, with E = M * L * D values of a hidden state, s bytes a value in the branches and r in the hidden
state (4 beside half precision), G blocks, B branches:

    caches       B * E * s for all rows of a worker, twice with forecast, and once more for the micro-batch
                 under way, whose backward still needs the values that it replaces; and all rows' projected
                 text, G * M * 2 S * D * s
    activations  attention E (r + 4s), cross-attention 2 E s, MLP E (r + 4s), each branch's y another E s;
                 with checkpointing r * E a group of branches, and this only for one group
    working      results and gradients of the branch under way, and the modulations: about 5 r E in the
                 backward, E (2r + 10s) without one
    lambda       two caches of a micro-batch and that working memory; no activations

Not in it: the CUDA context and libraries (about 1 GiB a process), and the allocator's fragmentation.
Shapes: M model rows (two a picture under guidance), L tokens, D width, S text tokens.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, get_args

import torch
import tyro

from harmonica.cache import Reuse
from harmonica.command_line import fail, say
from harmonica.models.base import BranchedTransformer
from harmonica.models.dit import ROWS_AT_ONCE
from harmonica.models.dit_config import dit_shape
from harmonica.models.loading import Dtype
from harmonica.models.stored import skeleton
from harmonica.passes import branches_per_checkpoint
from harmonica.sharding import shared_layers
from harmonica.torchvision_ops import ensure_torchvision_imports

NUM_STEPS = 20
"""Of a trajectory, where nothing else is said."""
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
    """Bytes of what `harmonica.sharding` spreads over processes."""
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
                f"model.architecture is {shape['architecture']}: its memory is not known, only that of "
                f"{', '.join(_SUB_LAYERS)}; add its sub-layers to harmonica.memory"
            )
        heads = shape["num_attention_heads"]
        full = [p for n, p in model.named_parameters() if n.startswith(model.full_precision_parts)]
        sharded = sum(p.nbytes for layer in shared_layers(model) for p in layer.parameters())
        return cls(
            kinds=kinds,
            cacheable=tuple(shape.get("cacheable", kinds)),
            layers=shape["num_layers"],
            width=heads * shape["attention_head_dim"],
            heads=heads,
            tokens=(shape["sample_size"] // shape["patch_size"]) ** 2,
            text_tokens=shape.get("text_tokens", 0),
            value_bytes=model.dtype.itemsize,
            hidden_bytes=max(model.dtype.itemsize, *(p.dtype.itemsize for p in full)),
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


def training_memory(
    shape: Shape,
    *,
    batch_size: int,
    micro_batch_size: int = 0,
    is_guided: bool = True,
    reuse: Reuse = "hold",
    activation_checkpointing: bool = False,
    processes: int = 1,
    num_steps: int = NUM_STEPS,
) -> Memory:
    """Peak of one worker's router training, when every branch is refreshed: SDT's or lambda's.

    Args:
        batch_size: rows of the worker.
        micro_batch_size: of these at a time; 0 is all.
        processes: that the model is sharded over.
    """
    per_row, kept = 1 + is_guided, 1 + (reuse == "forecast")
    size = micro_batch_size or batch_size
    rows, all_rows = per_row * size, per_row * batch_size
    prepared = shape.prepared(rows, num_steps)
    weights, values = shape.weights(processes), shape.num_branches * shape.value(1)
    sdt = Memory(
        weights,
        (kept * all_rows + rows) * values + -(-batch_size // size) * prepared,
        shape.activations(rows, checkpointing=activation_checkpointing),
        shape.working(rows, backward=True),
    )
    lambda_ = Memory(weights, 2 * kept * rows * values + prepared, 0, shape.working(rows))
    return max(sdt, lambda_, key=lambda memory: memory.total)


def sampling_memory(
    shape: Shape,
    *,
    batch_size: int,
    is_guided: bool = True,
    reuse: Reuse = "hold",
    processes: int = 1,
    num_steps: int = NUM_STEPS,
) -> Memory:
    """Peak of sampling; the images' decoder is not in it."""
    rows, kept = (1 + is_guided) * batch_size, 1 + (reuse == "forecast")
    caches = kept * shape.num_branches * shape.value(rows) + shape.prepared(rows, num_steps)
    return Memory(shape.weights(processes), caches, 0, shape.working(rows))


def _dit(image_size: int) -> BranchedTransformer:
    return skeleton(dit_shape("DiT-XL/2", image_size))


def _pixart(image_size: int, text_tokens: int) -> BranchedTransformer:
    ensure_torchvision_imports()
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    from harmonica.models.pixart import PixArt

    with torch.device("meta"):
        transformer = PixArtTransformer2DModel(sample_size=image_size // 8, use_additional_conditions=False)
        return PixArt(transformer, text_tokens=text_tokens)


MODELS: dict[str, Callable[[], BranchedTransformer]] = {
    "dit-xl-2-256": lambda: _dit(256),
    "dit-xl-2-512": lambda: _dit(512),
    "pixart-alpha-256": lambda: _pixart(256, 120),
    "pixart-alpha-512": lambda: _pixart(512, 120),
    "pixart-alpha-1024": lambda: _pixart(1024, 120),
    "pixart-sigma-2048": lambda: _pixart(2048, 300),
}
"""The public models by name and image size, without storage."""


def public_shape(name: str, dtype: torch.dtype) -> Shape:
    """Of a public model as it is loaded in a precision.

    Raises:
        ValueError: no such model.
    """
    if name not in MODELS:
        raise ValueError(f"model is {name!r}: give some of {', '.join(MODELS)}")
    model = MODELS[name]()
    for parameter_name, parameter in model.named_parameters():
        if not parameter_name.startswith(model.full_precision_parts):
            parameter.data = parameter.data.to(dtype)
    return Shape.of(model)


_HEADER = """\
| model | weights | caches | sampling | training, hold | recomputed | training, forecast | recomputed |
|---|---|---|---|---|---|---|---|"""


def _line(name: str, shape: Shape, batch_size: int, micro_batch_size: int, processes: int) -> str:
    need = partial(
        training_memory,
        shape,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        processes=processes,
    )
    sampling = sampling_memory(shape, batch_size=batch_size, processes=processes)
    sizes = [sampling.weights, sampling.caches, sampling.total]
    for reuse in get_args(Reuse):
        sizes += [need(reuse=reuse, activation_checkpointing=each).total for each in (False, True)]
    return f"| {name} | {' | '.join(f'{size / 2**30:.2f}' for size in sizes)} |"


def main(
    models: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(MODELS),
    *,
    batch_size: int = 1,
    micro_batch_size: int = 0,
    dtype: Dtype = "bfloat16",
    processes: int = 1,
) -> int:
    """Print what each model takes on one GPU in GiB, under guidance, as a Markdown table.

    Caches are the batch's when values are held; sampling holds them. `recomputed` is training with
    `train.sdt.activation_checkpointing`.
    """
    try:
        shapes = {name: public_shape(name, getattr(torch, dtype)) for name in models}
    except ValueError as error:
        return fail(error, code=2)
    say(_HEADER)
    for name, shape in shapes.items():
        say(_line(name, shape, batch_size, micro_batch_size, processes))
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
