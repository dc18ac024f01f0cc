"""What an operator lives through, done for real: whatever breaks, the router is that of an unbroken run, bit
for bit, and every metric is there once.
"""

import dataclasses
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cluster_runs import TRAJECTORIES, TrainingRun, closing, kill, until
from local_cluster import LocalCluster
from mlflow_server import MlflowServer
from s3_server import BUCKET, S3Server, s3_server
from tiny_dit import write_model

from harmonica.rows import Batch, Share, make_rows
from harmonica.samplers import SamplerConfig
from pipelines.checkpoints import FOLDER
from pipelines.presets import fashion
from pipelines.train import start_run
from pipelines.worker_times import NAMES

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
OUTAGE_S = 20.0


@pytest.fixture(scope="module")
def s3():
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def cluster(s3: S3Server):
    with LocalCluster(workers=2, head_cpus=3, worker_cpus=2, environment=s3.environment) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def make_run(cluster: LocalCluster, folder: Path):
    model = write_model(folder / "model")

    def make(name: str, **settings) -> TrainingRun:
        return TrainingRun(cluster, model, folder, name, **settings)

    return make


@pytest.fixture(scope="module")
def unbroken(make_run) -> TrainingRun:
    """Two workers, each on a node of its own, and nothing happens to them."""
    with closing(make_run("unbroken")) as run:
        run.start()
        run.wait_for(2)
        run.nodes_used = sum(bool(run.workers(node)) for node in range(3))
        assert run.wait() == 0, run.said
        return run


def check_same(run: TrainingRun, unbroken: TrainingRun, database: Path | None = None) -> None:
    assert torch.equal(run.router, unbroken.router)
    for metric in ("loss", "cur", "lambda.step_000"):
        assert run.curve(metric, database) == unbroken.curve(metric), metric


def test_two_nodes_train_as_one_process(unbroken: TrainingRun, folder: Path):
    assert unbroken.nodes_used == 2
    base = fashion()
    sdt = dataclasses.replace(base.train.sdt, learning_rate=0.01)
    train = dataclasses.replace(base.train, trajectories=TRAJECTORIES, batch_size=4, iepo_every=5, sdt=sdt)
    config = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, path=str(folder / "model")),
        sampler=SamplerConfig(num_inference_steps=6),
        train=train,
    )
    run, spec = start_run(config, torch.device("cpu"))
    share, alone = Share(4), []
    while run.trajectory < TRAJECTORIES:
        rows = Batch.of(make_rows(share.indices(np.arange(4), run.trajectory), spec), spec, "cpu")
        alone.append(run.train_one(rows.noise_NCHW, rows.condition_N, rows.keys))
    for metric in ("loss", "mse", "l1", "beta", "lambda.step_000"):
        ours = [(i + 1, point[metric]) for i, point in enumerate(alone) if metric in point]
        np.testing.assert_allclose(unbroken.curve(metric), ours, rtol=1e-5, err_msg=metric)
    torch.testing.assert_close(unbroken.router, run.router.logits(), rtol=1e-5, atol=1e-5)


def test_where_each_worker_s_time_goes_is_a_metric(unbroken: TrainingRun):
    kinds = [kind for kind in NAMES if kind != "forecast"]  # none is fitted here
    for name in (f"worker.{rank}.{kind}_s" for rank in (0, 1) for kind in kinds):
        steps, seconds = zip(*unbroken.curve(name))
        assert steps == tuple(range(1, TRAJECTORIES + 1)), name
        assert all(value >= 0 for value in seconds) and sum(seconds) > 0, name


def test_kill_of_a_training_worker(make_run, unbroken: TrainingRun):
    with closing(make_run("worker")) as run:
        run.start()
        run.wait_for(4)
        victim = next(pid for node in range(3) for pid in run.workers(node))
        kill(victim)
        assert run.wait() == 0, run.said
        check_same(run, unbroken)


def test_kill_of_a_raylet(make_run, cluster: LocalCluster, unbroken: TrainingRun):
    with closing(make_run("raylet")) as run:
        run.start()
        run.wait_for(4)
        used = [node for node in (1, 2) if run.workers(node)]
        cluster.nodes[used[0]].kill_raylet()
        try:
            assert run.wait() == 0, run.said
            check_same(run, unbroken)
        finally:
            cluster.nodes.pop(used[0]).stop()
            cluster.add_node()


@pytest.mark.parametrize("is_truncated", [False, True])
def test_kill_of_the_driver(make_run, unbroken: TrainingRun, is_truncated: bool):
    with closing(make_run(f"driver-{is_truncated}")) as run:
        run.start()
        run.wait_for(4)
        run.driver.kill()
        run.cluster_is_idle()
        before = run.trajectory
        newest = Path(run.storage.uri(FOLDER)) / run.storage.names(FOLDER)[-1]
        if is_truncated:
            newest.write_bytes(newest.read_bytes()[:-100])
        run.start()
        assert run.wait() == 0, run.said
        assert (f"{newest.name} is damaged" in run.said) == is_truncated, run.said
        assert before >= 4
        check_same(run, unbroken)


def test_s3_that_refuses_for_a_while(make_run, s3: S3Server, unbroken: TrainingRun):
    with closing(make_run("s3", storage_path=f"s3://{BUCKET}/runs")) as run:
        run.start()
        run.wait_for(4)
        s3.stop()
        threading.Timer(OUTAGE_S, s3.start).start()
        time.sleep(OUTAGE_S + 1)
        assert run.wait() == 0, run.said
        check_same(run, unbroken)


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
            filler.unlink()
            run.complete("--train.max-failures=0")
            check_same(run, unbroken)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_kill_of_the_mlflow_server(make_run, folder: Path, unbroken: TrainingRun):
    with MlflowServer(folder / "server") as server, closing(make_run("mlflow", mlflow=server.uri)) as run:
        run.start()
        run.wait_for(4)
        server.kill()
        threading.Timer(OUTAGE_S, server.start).start()
        assert run.wait() == 0, run.said
        until("the server is back", server.answers)
        check_same(run, unbroken, folder / "server" / "mlflow.db")
        assert [step for step, _ in run.curve("loss", folder / "server" / "mlflow.db")] == [
            *range(1, TRAJECTORIES + 1)
        ]
