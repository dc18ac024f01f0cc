"""A run that stands still fails with what it waits for."""

import os
import signal
import threading
import time

import pytest
import ray
from ray.util.state import list_nodes

from harmonica.training.progress import PhaseCosts, Progress
from pipelines.run_state.interruption import Terminated, kept_sigterm, sigterm_raises
from pipelines.training import watchdog
from pipelines.training.watchdog import Reached, make_board, run_watched

PROGRESS = Progress([PhaseCosts("start", (10.0, 10.0)), PhaseCosts("router", (1.0,) * 10)])


def reached_at(done: int, since: int, seconds: float) -> Reached:
    return Reached(PROGRESS.message(done), PROGRESS.time_left_message(done, since, seconds), 1.5e-5, 0.402)


def test_what_a_worker_announces_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    lines = watchdog._Lines()
    for line in ("", "train.budget is 3 minutes", "train.budget is 3 minutes", "fewer"):
        lines.announce(line)
    assert capsys.readouterr().out.splitlines() == ["[train] train.budget is 3 minutes", "[train] fewer"]


def assert_workers_ask_this_cluster() -> None:
    """Whatever else runs on the machine, or was killed: as Ray Data does about tasks that seem to hang."""

    def ask() -> list[str]:
        return [node.node_id for node in list_nodes()]

    assert ray.get(ray.remote(num_cpus=0)(ask).remote()) == [ray.get_runtime_context().get_node_id()]
    assert "RAY_API_SERVER_ADDRESS" not in os.environ, "what the user starts later is not this cluster's"


@pytest.mark.cluster
def test_standing_still_is_an_error_that_says_at_what(private_cluster: None) -> None:
    assert_workers_ask_this_cluster()
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


@pytest.mark.cluster
def test_no_thread_is_left_waiting_for_ray(private_cluster: None) -> None:
    """One that were would crash the process at its end; and SIGTERM stays itself."""
    board, here = make_board(), threading.active_count()
    stop = threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM))

    def work() -> None:
        stop.start()
        ray.get(ray.remote(num_cpus=0)(lambda: time.sleep(60)).remote())

    with pytest.raises(Terminated):
        run_watched(work, board, 60, "")
    stop.join()  # it may not have returned from the signal yet
    assert threading.active_count() <= here


def test_sigterm_is_itself_whatever_a_wait_makes_of_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), sigterm_raises():
        try:
            with kept_sigterm():  # what a library sets is gone again
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except Terminated:
            raise KeyboardInterrupt from None
    with pytest.raises(KeyboardInterrupt) as plain, sigterm_raises():
        raise KeyboardInterrupt
    assert not isinstance(plain.value, Terminated)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_line_of_progress_at_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 5.0, 24.0, 30.0, 50.0, 70.0])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(clock))
    lines = watchdog._Lines()
    for reached in (
        None,
        reached_at(1, 0, 20.0),
        reached_at(2, 0, 26.0),  # too soon after the line before
        reached_at(11, 10, 3.0),  # a worker that goes on from a checkpoint
        reached_at(11, 10, 3.0),
    ):
        lines.show(reached)
    assert capsys.readouterr().out.splitlines() == [
        "[train] measuring the start: 1 of 2 trajectories, loss 1.5e-05, CUR 40.2%, 0:00:20 left in this "
        "phase, 0:00:40 in all; then training the router",
        "[train] training the router: 9 of 10 trajectories, loss 1.5e-05, CUR 40.2%, 0:00:03 left",
    ]
