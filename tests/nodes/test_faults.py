"""What an operator lives through, done for real: whatever breaks, the router is that of an unbroken run, bit
for bit, and every metric is there once.
"""

import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from cluster_runs import TRAJECTORIES, TrainingRun, check_same, closing, kill, until
from local_cluster import LocalCluster
from mlflow_server import MlflowServer
from s3_server import BUCKET, S3Server

from pipelines.run_state.lease import claim
from pipelines.run_state.resume import recorded
from pipelines.training.checkpoints import FOLDER

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
OUTAGE_S = 20.0


def test_where_each_worker_s_time_goes_is_a_metric(unbroken: TrainingRun):
    times = unbroken.metrics("train", "worker.%")
    kinds = ("data", "teacher", "student", "backward", "reduce", "lambda")
    assert times.keys() == {f"worker.{rank}.{kind}_s" for rank in (0, 1) for kind in kinds}
    for name, points in times.items():
        steps, seconds = zip(*points)
        assert steps == tuple(range(1, TRAJECTORIES + 1)), name
        if name.endswith("lambda_s"):  # refreshed every fifth trajectory, and no time in between
            assert [value > 0 for value in seconds] == [step % 5 == 1 for step in steps]
        else:
            assert all(value > 0 for value in seconds), name


def test_kill_of_a_training_worker_and_then_of_a_raylet(
    make_run, cluster: LocalCluster, unbroken: TrainingRun
):
    with closing(make_run("worker")) as run:
        run.start()
        run.wait_for(4)
        victim = next(pid for node in range(3) for pid in run.workers(node))
        run.breaks()
        kill(victim)
        run.wait_for(run.trajectory + 3)  # more than the step under way: the new workers train
        used = [node for node in (1, 2) if run.workers(node)]
        assert victim not in {pid for node in range(3) for pid in run.workers(node)}
        run.breaks()
        cluster.nodes[used[0]].kill_raylet()
        try:
            assert run.wait() == 0, run.said
            check_same(run, unbroken)
        finally:
            cluster.nodes.pop(used[0]).stop()
            cluster.add_node()


def test_killed_while_stages_are_done_again(make_run, unbroken: TrainingRun):
    both = ("train", "evaluate")
    judged = ["--evaluate.samples=16", "--evaluate.batch-size=8", "--evaluate.timing-rounds=1"]
    judged += ["--evaluate.num-actors=1"]  # each takes seven seconds of a core to start
    with closing(make_run("again")) as run:
        folder = Path(run.storage.uri())

        def results() -> dict[str, bytes]:
            names = ("router/config.json", "router/router.safetensors", "report.json", "samples.png")
            return {name: (folder / name).read_bytes() for name in names}

        run.start("--train.trajectories=4", *judged, stages=both)
        assert run.wait() == 0, run.said
        before, old = results(), run.router
        written = {name: (folder / name).stat().st_mtime_ns for name in before}
        run.start("--from=train", *judged, stages=both)
        run.wait_for(5)
        with pytest.raises(ValueError, match=f"is being written by process {run.pid} on"):
            claim(run.storage)
        run.driver.kill()
        run.cluster_is_idle()
        assert results() == before and torch.equal(run.router, old), "all that was there still is"

        run.start(*judged, stages=both)  # at once, and without --from
        until(
            "the new router",
            lambda: not recorded(run.storage).is_undone("train"),
            sign=lambda: run.trajectory,
        )
        run.driver.kill()
        run.cluster_is_idle()
        assert "resumed after trajectory" in run.said
        check_same(run, unbroken)
        assert {name for name in before if results()[name] == before[name]} == {"report.json", "samples.png"}

        run.start("--from=train", *judged, stages=both)  # the same command: what is done since stays
        assert run.wait() == 0, run.said
        assert run.said.count("[train] done before") == 1
        check_same(run, unbroken)
        assert all((folder / name).stat().st_mtime_ns > written[name] for name in before)
        assert not (folder / "train").exists() and not (folder / "lease.json").exists()


def test_s3_that_refuses_for_a_while_and_then_kill_of_the_mlflow_server(
    make_run, folder: Path, s3: S3Server, unbroken: TrainingRun
):
    with (
        MlflowServer(folder / "server") as server,
        closing(make_run("outages", storage_path=f"s3://{BUCKET}/runs", mlflow=server.uri)) as run,
    ):
        run.start()
        run.wait_for(4)
        run.breaks()
        s3.stop()
        threading.Timer(OUTAGE_S, s3.start).start()
        time.sleep(OUTAGE_S + 1)
        run.wait_for(run.trajectory + 2)
        run.breaks()
        server.kill()
        threading.Timer(OUTAGE_S, server.start).start()
        assert run.wait() == 0, run.said
        until("the server is back", server.answers)
        check_same(run, unbroken, folder / "server" / "mlflow.db")


def test_a_full_disk(make_run, folder: Path, unbroken: TrainingRun):
    small = folder / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system wants root")
    filler = small / "filler"
    try:
        with closing(make_run("full", storage_path=str(small))) as run:
            run.start("--train.max-failures=0")
            run.wait_for(4)
            with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
                while True:
                    file.write(b"x" * 512)
            assert run.wait() == 1
            assert "finds no room (No space left on device)" in run.said
            assert "make room and run again with the same run id" in run.said
            before = run.storage.names(FOLDER)
            assert len(before) == 3
            run.breaks()
            filler.unlink()
            run.complete("--train.max-failures=0")
            check_same(run, unbroken)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
