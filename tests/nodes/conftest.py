"""One cluster of three nodes, one S3 store and one unbroken run for all tests here."""

from pathlib import Path

import pytest
from cluster_runs import TrainingRun, closing
from local_cluster import LocalCluster
from s3_server import S3Server, s3_server
from tiny_dit import write_model


@pytest.fixture(scope="package")
def s3():
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="package")
def cluster(s3: S3Server):
    """Its head has room for two runs, of four workers and of two, so that each can be on one node."""
    with LocalCluster(workers=2, head_cpus=6, worker_cpus=2, environment=s3.environment) as cluster:
        yield cluster


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="package")
def make_run(cluster: LocalCluster, folder: Path):
    model = write_model(folder / "model")

    def make(name: str, **settings) -> TrainingRun:
        return TrainingRun(cluster, model, folder, name, **settings)

    return make


@pytest.fixture(scope="package")
def unbroken(make_run) -> TrainingRun:
    """Two workers, each on a node of its own, and nothing happens to them."""
    with closing(make_run("unbroken")) as run:
        return run.complete()
