"""Metrics of training reach MLflow once each: a real SQLite store, and an address where nothing answers."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipelines.run_state.storage import RunStorage
from pipelines.tracking.metric_log import MetricLog
from pipelines.tracking.mlflow_runs import Point, StageRun, find_or_create
from pipelines.training import run_recorder
from pipelines.training.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder whose database exists: making one costs seconds."""
    return str(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(store, monkeypatch, request) -> StageRun:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("RETRIES", "BACKOFF_FACTOR"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{'MAX_' if name == 'RETRIES' else ''}{name}", "0")
    return find_or_create("train", request.node.name, store, {})


@pytest.fixture
def silent(run) -> StageRun:
    """The same run where nothing listens."""
    return dataclasses.replace(run, uri="http://user:hush@127.0.0.1:1")


def steps(run: StageRun, metric: str = "loss") -> list[int]:
    return [point.step for point in run.client.get_metric_history(run.mlflow_run_id, metric)]


def add(log: MetricLog, *trajectories: int) -> None:
    for trajectory in trajectories:
        log.add(trajectory, {"loss": 1 / trajectory, "cur": 0.5})


def test_each_flush_sends_what_is_new(run):
    log = MetricLog(run)
    add(log, 1, 2)
    assert log.flush() and log.state() == []
    add(log, 3)
    assert log.flush()
    assert steps(run) == steps(run, "cur") == [1, 2, 3]


def test_what_nobody_answered_to_waits_for_the_next_worker(run, silent, caplog):
    log = MetricLog(silent)
    add(log, 1, 2)
    assert not log.flush()
    assert "2 trajectories wait in the checkpoint" in caplog.text
    assert "hush" not in caplog.text
    resumed = MetricLog(run, log.state())
    add(resumed, 3)
    assert resumed.flush()
    assert steps(run) == [1, 2, 3]


def test_trajectories_trained_again_are_not_logged_again(run):
    first = MetricLog(run)
    add(first, 1, 2, 3)
    first.flush()
    resumed = MetricLog(run)  # from a checkpoint before them
    add(resumed, 2, 3, 4)
    assert resumed.flush()
    add(resumed, 5)
    assert resumed.flush()
    assert steps(run) == [1, 2, 3, 4, 5]


def test_points_sent_again_after_a_lost_answer_are_stored_once(run):
    points = [Point(step, 1000 + step, {"loss": 1.0, "cur": 0.5}) for step in range(1, 4)]
    run.log_points(points[:2])
    run.log_points(points)
    assert steps(run) == [1, 2, 3]


def test_many_points_go_in_several_requests(run):
    wide = {f"lambda.step_{i:03d}": 0.5 for i in range(99)}
    run.log_points([Point(step, 1, wide | {"loss": 1.0}) for step in range(1, 26)])
    assert steps(run) == steps(run, "lambda.step_098") == list(range(1, 26))
    assert run.last_step("loss") == 25 and run.last_step("none") == -1


def test_a_kill_between_the_requests_of_a_point_leaves_each_metric_once(run, monkeypatch):
    """A point of more metrics than a request takes, sent by a worker that is killed after every request."""
    wide = {"loss": 0.5} | {f"lambda.step_{i:04d}": 0.5 for i in range(1500)}
    kept: list = []

    class Killed(BaseException):
        pass

    def killed(client, *arguments, **others):
        send(client, *arguments, **others)
        raise Killed

    send = MlflowClient.log_batch
    monkeypatch.setattr(MlflowClient, "log_batch", killed)
    for _ in range(2):  # the second one goes on from the same checkpoint
        log = MetricLog(run, kept)
        if not kept:
            log.add(1, wide)
            kept = log.state()
        with pytest.raises(Killed):
            log.flush()
    monkeypatch.undo()
    resumed = MetricLog(run, kept)
    assert resumed.flush()
    assert all(steps(run, name) == [1] for name in ("loss", "lambda.step_0000", "lambda.step_1499"))


def test_patience_ends_with_what_to_do(silent):
    log = MetricLog(silent)
    add(log, 1)
    words = r"MLflow at http://127.0.0.1:1 has not answered for 0 s and lacks 1 traj.*again with the same run"
    with pytest.raises(TimeoutError, match=words):
        log.finish(patience_s=0)


def test_what_does_not_pass_by_itself_is_raised(run):
    gone = MetricLog(dataclasses.replace(run, mlflow_run_id="0" * 32))
    add(gone, 1)
    with pytest.raises(MlflowException, match="not found"):
        gone.flush()


def test_pictures_are_few_and_the_last_checkpoint_s_is_there(run, tmp_path, monkeypatch):
    """Each takes a third of a second of a core, and checkpoints may be written as often."""
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(run_recorder.time, "monotonic", lambda: next(clock))
    model = SimpleNamespace(branches=[SimpleNamespace(name="attn 0")])
    training = SimpleNamespace(
        trajectory=0,
        all_trajectories=20,
        announcement="",
        sampler=SimpleNamespace(model=model),
        plan=SimpleNamespace(to_tensor=lambda: torch.ones(2, 1)),
        router=SimpleNamespace(logits=lambda: torch.zeros(2, 1)),
        state=dict,
    )
    checkpoints = Checkpoints(RunStorage(str(tmp_path), "pictures"))
    recorder = run_recorder.RunRecorder(checkpoints, training, run, board=None, pending=[])
    for training.trajectory in range(1, 21):
        recorder.save()
    drawn = [path.path for path in run.client.list_artifacts(run.mlflow_run_id, "router")]
    assert drawn[0] == "router/trajectory_000001.png" and drawn[-1] == "router/trajectory_000020.png"
    assert 3 <= len(drawn) <= 6, drawn
