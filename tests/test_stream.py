"""Rows: which make a trajectory depends on nothing but k and the global batch size."""

import numpy as np
import pytest
import ray

from pipelines.runtime import connect
from pipelines.stream import RowSpec, Share, make_rows, stream_rows

SPEC = RowSpec(seed=3, num_classes=10, shape=(1, 4, 4))


def test_trajectory_rows_do_not_depend_on_workers() -> None:
    def rows_of(world_size: int, trajectory: int) -> set[int]:
        shares = [Share(8, rank, world_size) for rank in range(world_size)]
        return {int(i) for s in shares for i in s.indices(np.arange(s.size), trajectory)}

    for trajectory in (0, 5):
        expected = set(range(8 * trajectory, 8 * trajectory + 8))
        assert all(rows_of(workers, trajectory) == expected for workers in (1, 2, 4))


def test_a_share_goes_on_where_an_earlier_one_stopped() -> None:
    share = Share(8, rank=1, world_size=2)
    whole = share.indices(np.arange(40), 0)
    resumed = share.indices(np.arange(24), 4)
    np.testing.assert_array_equal(whole[16:], resumed)


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
