"""Stream samples by Ray Data; each worker opens its own stream, in order.

A stream is of the worker's shard alone.

A row is 3 kB for the built-in model, and 3.5 MB for PixArt-Sigma at 2K: 2.5 MB of prompt, 1 MB of noise.
"""

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import TaskPoolStrategy

from harmonica.data.prompts import PromptStore
from harmonica.data.samples import SampleSpec, Shard
from harmonica.models.base import BranchedTransformer

from ..config.workflow import WorkflowConfig
from ..run_state.resume import work_folder
from ..run_state.storage import RunStorage
from .rows import Rows

_SAMPLES_PER_BLOCK, _BYTES_PER_BLOCK = 256, 32 * 2**20
# A row costs microseconds, so its tasks claim no core: they would wait for ever where workers have them
# all, as elastic ones may after the loss of a node. Few at a time, or there would be one a block.
_TASK_CPUS, _TASKS = 0, 2


def sample_spec(config: WorkflowConfig, model: BranchedTransformer, seed: int) -> SampleSpec:
    """Return the spec of the run's samples.

    Prompts are those that its stage `prompts` embedded.
    """
    if model.num_classes:
        return SampleSpec.of(model, seed)
    storage = RunStorage(config.storage_path, config.run_id)
    uri = storage.uri(work_folder("prompts", storage))
    return SampleSpec.of(model, seed, PromptStore(uri))


def stream_samples(
    spec: Rows,
    shard: Shard,
    *,
    first_trajectory: int = 0,
    trajectories: int,
    samples_per_block: int = 0,
) -> ray.data.Dataset:
    """Stream this worker's samples of `trajectories` trajectories, in order.

    Args:
        samples_per_block: samples of a block; 0 chooses a block of some tens of megabytes.
    """
    samples_per_block = samples_per_block or max(
        1, min(_SAMPLES_PER_BLOCK, _BYTES_PER_BLOCK // spec.sample_bytes)
    )
    count = trajectories * shard.size
    # Order is what makes a trajectory's rows belong together; by default Ray Data gives none.
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True

    def make(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return spec.make(shard.indices(batch["id"], first_trajectory))

    # Not `ray.data.range`, whose own tasks each claim a core.
    firsts = range(0, count, samples_per_block)
    ids = [pa.table({"id": np.arange(i, min(i + samples_per_block, count))}) for i in firsts]
    stream: ray.data.Dataset = ray.data.from_blocks(ids).map_batches(
        make,
        batch_size=samples_per_block,
        num_cpus=_TASK_CPUS,
        compute=TaskPoolStrategy(size=min(_TASKS, len(ids))),
    )
    return stream
