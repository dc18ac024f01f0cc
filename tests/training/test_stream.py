"""Rows: which make a trajectory depends on nothing but k and the global batch size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick

from harmonica.data.samples import SampleSpec, Shard, make_samples
from harmonica.samplers.noise import sample_label, sample_noise
from pipelines.data.stream import stream_samples

SPEC = SampleSpec(seed=3, num_classes=10, shape=(1, 4, 4))


@quick
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.integers(1, 4))
def test_trajectories_are_one_sequence_of_rows_cut_by_the_global_batch_size_alone(
    shard_size: int, workers: int, first: int, count: int
) -> None:
    batch_size = shard_size * workers
    shards = [Shard(batch_size, rank, workers) for rank in range(workers)]
    made = [make_samples(shard.indices(np.arange(count * shard_size), first), SPEC) for shard in shards]
    sequence = [
        {"index": i, "label": sample_label(3, i, 10), "noise": sample_noise(3, i, (1, 4, 4))}
        for i in range(first * batch_size, (first + count) * batch_size)
    ]
    for name in ("index", "label", "noise"):
        trajectories = np.split(np.stack([row[name] for row in sequence]), count)
        # Of each worker its shard of every trajectory, in order; ranks follow each other.
        ours = [np.concatenate(parts) for parts in zip(*(np.split(rows[name], count) for rows in made))]
        np.testing.assert_array_equal(ours, trajectories)


@pytest.mark.cluster
def test_streamed_rows_are_the_pure_function(private_cluster: None) -> None:
    shard = Shard(4, rank=1, world_size=2)
    rows = stream_samples(SPEC, shard, first_trajectory=2, trajectories=10, samples_per_block=3)
    batches = list(rows.iter_batches(batch_size=shard.size, batch_format="numpy"))
    index = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(index, shard.indices(np.arange(20), 2))
    expected = make_samples(index, SPEC)
    for name, values in expected.items():
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches]), values)
