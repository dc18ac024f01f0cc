"""A run that stands still fails with what it waits for."""

import time

import pytest
import ray

from pipelines import progress
from pipelines.progress import Reached, make_board, run_watched
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


def test_a_line_of_progress_at_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 5.0, 10.0, 24.0, 34.0, 40.0, 50.0, 60.0, 79.0, 80.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    lines = progress._Lines()
    for trajectory in (None, 1, 20, 41, 41, 90, 40, 60, 80):
        lines.show(trajectory and Reached(trajectory, 600, 1.5e-5, 0.402))
    assert capsys.readouterr().out.splitlines() == [
        "[train] trajectory 41 of 600, loss 1.5e-05, CUR 40.2%, 1.67 trajectories/s, 0:05:35 left",
        "[train] trajectory 80 of 600, loss 1.5e-05, CUR 40.2%, 2.00 trajectories/s, 0:04:20 left",
    ]
