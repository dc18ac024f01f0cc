"""A run that stands still fails with what it waits for."""

import time

import pytest
import ray

from pipelines.progress import make_board, run_watched
from pipelines.runtime import connect


@pytest.mark.cluster
def test_standing_still_is_an_error_that_says_at_what(request: pytest.FixtureRequest) -> None:
    connect()
    request.addfinalizer(ray.shutdown)
    board = make_board()
    ray.get(board.read.remote())
    words = (
        r"no training worker has started for \d s: it waits for 9 workers, and the cluster has .* CPU free"
    )
    with pytest.raises(TimeoutError, match=words):
        run_watched(lambda: time.sleep(60), board, 2, "9 workers")
    ray.get([board.tell.remote(1, "rows of trajectory 3"), board.tell.remote(0, "the model")])
    words = r"no progress for 2 s .*: rank 0: the model \(2 s\); rank 1: rows of trajectory 3 \(2 s\)"
    with pytest.raises(TimeoutError, match=words):
        run_watched(lambda: time.sleep(60), board, 2, "9 workers")
    assert run_watched(lambda: 7, board, 60, "") == 7
    with pytest.raises(ZeroDivisionError):
        run_watched(lambda: 1 // 0, board, 60, "")
