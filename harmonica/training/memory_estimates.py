"""Expected memory of training and sampling, by a formula from a model's shape.

In bytes, with E = M * L * D values of a hidden state, s bytes a value in the branches and r in the hidden
state (4 beside half precision), G blocks, B branches:

    caches       B * E * s for all rows of a worker, twice with forecast, and once more for the micro-batch
                 under way, whose backward still needs the values that it replaces; and what is made ahead of
                 a trajectory: all rows' projected text, G * M * 2 S * D * s, or a DiT's modulations of
                 some 64 rows, G * 64 * 6 D * s
    activations  attention E (r + 4s), cross-attention 2 E s, MLP E (r + 4s), each branch's y another E s;
                 with checkpointing r * E a group of branches, and this only for one group
    working      results and gradients of the branch under way, and the modulations: about 5 r E in the
                 backward, E (2r + 10s) without one
    lambda       two caches of a micro-batch and that working memory; no activations
    start, fit   the activations of all steps but the first, in the fit of those that the plan computes; with
                 checkpointing of a step only r * E a group of branches; besides, of a step the values, r * E
                 a segment where branches are reused as one; and in the fit gradients of the last values. With
                 offloading the activations are in the host's memory

Not included are the CUDA context and libraries (about 1 GiB a process), and the allocator's fragmentation.
Shapes: M model rows (two an image under guidance), L tokens, D width, S text tokens.
"""

from dataclasses import replace

import torch

from harmonica.core.cache import Reuse, values_kept
from harmonica.models.base import BranchedTransformer
from harmonica.models.public_shapes import MODELS
from harmonica.training.memory_model import Memory, Shape
from harmonica.training.memory_savings import NO_SAVINGS, MemorySavings

NUM_STEPS = 20
"""Number of steps of a trajectory, by default."""


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
    """Return the peak memory of one worker's router training.

    Every branch is refreshed; the peak is that of SDT or of lambda, whichever is larger.

    Args:
        batch_size: number of the worker's rows.
        micro_batch_size: number of these rows that run at a time; 0 is all.
        processes: number of processes that the model is sharded over.
    """
    per_row, kept = 1 + is_guided, values_kept(reuse)
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


def learning_memory(
    shape: Shape,
    *,
    rows_at_once: int,
    computed_steps: float,
    is_guided: bool = True,
    order: int = 2,
    segments: bool = False,
    savings: MemorySavings = NO_SAVINGS,
    processes: int = 1,
    num_steps: int = NUM_STEPS,
) -> tuple[Memory, Memory]:
    """Return the peak memory of the measured start and that of the fit.

    Of the fit it is an upper bound: a plan may compute several steps before it first reuses anything.

    Args:
        rows_at_once: number of images that a worker has at a time.
        computed_steps: number of steps of a trajectory that the plan computes.
        order: number of differences in a forecast.
        segments: whole steps are reused, and branches without uncached sub-layers between them as one. It
            is so where all blocks are one branch.
    """
    segments = segments or shape.are_one_branch
    rows = (1 + is_guided) * rows_at_once
    weights, values = shape.weights(processes), shape.num_branches * shape.value(rows)
    if segments:
        values = shape.num_segments * shape.hidden(rows)
    prepared, working = shape.prepared(rows, num_steps), shape.working(rows, backward=True)
    if savings.recompute:
        working += shape.of_group(rows, segments=segments)
    step = shape.of_step(rows, checkpointing=savings.recompute, segments=segments)
    of_start, of_fit = (num_steps - 1) * step, round((computed_steps - 1) * step)
    if segments:
        # No gradient reaches inside of the first two steps. Each step keeps its value, and what enters its
        # head, in the start twice.
        others = (num_steps - 1) * (values + 2 * shape.hidden(rows))
        of_start, of_fit = (num_steps - 2) * step + others, round((computed_steps - 1) * step) + others
    # The fit has gradients of the last values; before those, where values go to the host, these themselves.
    caches = values + prepared, (2 + order) * values + prepared
    start, fit = Memory(weights, caches[0], of_start, working), Memory(weights, caches[1], of_fit, working)
    if savings.offload:
        # What an MLP's backward reads and returns; elsewhere it takes the place of what the step before kept.
        working += (4 if savings.recompute else 8) * shape.value(rows)
        # The first step's values too, and what each step keeps of its head.
        others = values + num_steps * 2 * shape.hidden(rows)
        if segments:
            working, others = working + 2 * shape.hidden(rows), values + 3 * shape.hidden(rows)
        start, fit = (
            replace(each, activations=0, working=working, host=each.activations + others)
            for each in (start, fit)
        )
    return start, fit


def sampling_memory(
    shape: Shape,
    *,
    batch_size: int,
    is_guided: bool = True,
    values: int = 1,
    processes: int = 1,
    num_steps: int = NUM_STEPS,
) -> Memory:
    """Return the peak memory of sampling, without the images' decoder.

    Args:
        values: number of a branch's values that the cache keeps (`harmonica.core.cache.values_kept`).
    """
    rows = (1 + is_guided) * batch_size
    caches = values * shape.num_branches * shape.value(rows) + shape.prepared(rows, num_steps)
    return Memory(shape.weights(processes), caches, 0, shape.working(rows))


def public_shape(name: str, dtype: torch.dtype) -> Shape:
    """Return the shape of a public model as it is loaded in a precision.

    Raises:
        ValueError: there is no such model.
    """
    if name not in MODELS:
        raise ValueError(f"model is {name!r}: give some of {', '.join(MODELS)}")
    return loaded_shape(MODELS[name](), dtype)


def loaded_shape(model: BranchedTransformer, dtype: torch.dtype) -> Shape:
    """Return a model's shape as a loader leaves it in a precision; change the model."""
    for parameter_name, parameter in model.named_parameters():
        if not parameter_name.startswith(model.full_precision_parts):
            parameter.data = parameter.data.to(dtype)
    return Shape.of(model)
