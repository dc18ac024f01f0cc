"""Rows: which make a trajectory depends on nothing but k and the global batch size."""

import numpy as np
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick

from harmonica.data.batch import RowSpec, Share, make_rows
from harmonica.samplers.noise import row_label, row_noise
from pipelines.data.stream import stream_rows
from pipelines.runtime.ray_runtime import connect

SPEC = RowSpec(seed=3, num_classes=10, shape=(1, 4, 4))


@quick
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.integers(1, 4))
def test_trajectories_are_one_sequence_of_rows_cut_by_the_global_batch_size_alone(
    share_size: int, workers: int, first: int, count: int
) -> None:
    batch_size = share_size * workers
    shares = [Share(batch_size, rank, workers) for rank in range(workers)]
    made = [make_rows(share.indices(np.arange(count * share_size), first), SPEC) for share in shares]
    sequence = [
        {"index": i, "label": row_label(3, i, 10), "noise": row_noise(3, i, (1, 4, 4))}
        for i in range(first * batch_size, (first + count) * batch_size)
    ]
    for name in ("index", "label", "noise"):
        trajectories = np.split(np.stack([row[name] for row in sequence]), count)
        # Of each worker its share of every trajectory, in order; ranks follow each other.
        ours = [np.concatenate(parts) for parts in zip(*(np.split(rows[name], count) for rows in made))]
        np.testing.assert_array_equal(ours, trajectories)


@pytest.mark.cluster
def test_streamed_rows_are_the_pure_function(request: pytest.FixtureRequest) -> None:
    connect()
    request.addfinalizer(ray.shutdown)
    share = Share(4, rank=1, world_size=2)
    rows = stream_rows(SPEC, share, first_trajectory=2, trajectories=10, rows_per_block=3)
    batches = list(rows.iter_batches(batch_size=share.size, batch_format="numpy"))
    index = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(index, share.indices(np.arange(20), 2))
    expected = make_rows(index, SPEC)
    for name, values in expected.items():
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches]), values)
