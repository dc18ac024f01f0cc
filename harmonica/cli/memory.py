"""Print the expected memory of training and sampling.

    python -m harmonica.cli.memory                                            # a table for the public models
    python -m harmonica.cli.memory pixart-sigma-2048 --batch-size 8 --micro-batch-size 1 --processes 4

`harmonica.training.memory_estimates` has the formulas, and what they leave out.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated, get_args

import torch
import tyro

from harmonica.cli.common import fail, say
from harmonica.core.cache import Reuse
from harmonica.models.loading import Dtype
from harmonica.models.public_shapes import MODELS
from harmonica.training.memory_estimates import public_shape, sampling_memory, training_memory
from harmonica.training.memory_model import Shape

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


def print_table(
    models: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(MODELS),
    *,
    batch_size: int = 1,
    micro_batch_size: int = 0,
    dtype: Dtype = "bfloat16",
    processes: int = 1,
) -> int:
    """Print each model's memory on one GPU in GiB, as a Markdown table.

    Sampling and training are under guidance. Caches are the batch's when values are held; sampling holds
    them. `recomputed` is training with `train.sdt.activation_checkpointing`.
    """
    try:
        shapes = {name: public_shape(name, getattr(torch, dtype)) for name in models}
    except ValueError as error:
        return fail(error, code=2)
    say(_HEADER)
    for name, shape in shapes.items():
        say(_line(name, shape, batch_size, micro_batch_size, processes))
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the command; return 0 if it printed the table, and 2 for an unknown model."""
    return tyro.cli(print_table, args=arguments, prog="harmonica memory")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
