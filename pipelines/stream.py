"""A Ray Data stream of rows, of which each worker opens its own: just its share, in order.

A row is 3 kB for the built-in model, made where it is used.
"""

import numpy as np
import ray.data

from harmonica.rows import RowSpec, Share, make_rows

ROWS_PER_BLOCK = 256
_TASK_CPUS = 0.25  # a row costs microseconds: never let the stream hold a core that trains


def stream_rows(
    spec: RowSpec,
    share: Share,
    *,
    first_trajectory: int = 0,
    trajectories: int,
    rows_per_block: int = ROWS_PER_BLOCK,
) -> ray.data.Dataset:
    """This worker's rows of `trajectories` trajectories, in order, streamed."""
    count = trajectories * share.size
    # Order is what makes a trajectory's rows belong together; by default Ray Data gives none.
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True

    def make(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return make_rows(share.indices(batch["id"], first_trajectory), spec)

    blocks = max(1, -(-count // rows_per_block))
    return ray.data.range(count, override_num_blocks=blocks).map_batches(
        make, batch_size=rows_per_block, num_cpus=_TASK_CPUS
    )
