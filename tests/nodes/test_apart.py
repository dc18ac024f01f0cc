"""Training and serving on clusters of their own, which meet in the registry and on S3 and nowhere else."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from cluster_runs import TrainingRun, closing, until
from local_cluster import LocalCluster
from mlflow_server import MlflowServer
from processes import Session, free_port
from s3_server import BUCKET, S3Server
from tiny_dit import write_model

from harmonica.models.loading import ModelConfig
from pipelines.tracking import registry

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
NAME = "tiny"


@pytest.fixture
def model(s3: S3Server, tmp_path: Path) -> ModelConfig:
    """A model on S3, since the clusters share no folder."""
    write_model(tmp_path / "model")
    for path in (tmp_path / "model").iterdir():
        s3.client().put_object(Bucket=BUCKET, Key=f"models/tiny/{path.name}", Body=path.read_bytes())
    return ModelConfig(path=f"s3://{BUCKET}/models/tiny")


@pytest.fixture
def mlflow(s3: S3Server, tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path / "mlflow", artifacts=f"s3://{BUCKET}/mlflow", environment=s3.environment)
    with server:
        yield server


def machines(home: Path, count: int, s3: S3Server, mlflow: MlflowServer) -> LocalCluster:
    """A cluster with a home of its own, whose processes know what `cluster/base/settings.yaml` tells."""
    home.mkdir()
    own = {"HOME": str(home), "HARMONICA_CACHE": str(home / "cache")}
    told = s3.environment | {"MLFLOW_TRACKING_URI": mlflow.uri}
    return LocalCluster(workers=count - 1, head_cpus=3, worker_cpus=2, environment=own | told)


def train(cluster: LocalCluster, name: str, model: ModelConfig, mlflow: MlflowServer, workers: int) -> None:
    """Train, register what comes of it, and make it the champion; each worker on a node of its own."""
    settings = {"storage_path": f"s3://{BUCKET}/runs", "mlflow": mlflow.uri, "trajectories": 2}
    with closing(TrainingRun(cluster, model, mlflow.folder, name, **settings)) as run:
        arguments = ("--promote=always", f"--registered-model={NAME}", f"--train.num-workers={workers}")
        run.start(*arguments, stages=("train", "register"))
        # Not `run.wait`, which asks S3 for checkpoints all the time, and that answers in this process.
        ended = run.driver.process.poll
        until("the driver's end", lambda: ended() is not None, sign=lambda: run.log.stat().st_size)
        assert ended() == 0, run.said[-3000:]
        assert run.nodes == workers


@contextmanager
def serving(cluster: LocalCluster, model: ModelConfig) -> Iterator[str]:
    """URL of an endpoint that follows the champion."""
    port = free_port()
    command = [sys.executable, "-m", "pipelines.serve", f"--serve.port={port}"]
    command += [f"--model.path={model.path}", f"--registered-model={NAME}"]
    session = Session(command, cluster.environment, cluster.folder / "serve.log")

    def serves() -> bool:
        session.check_alive("pipelines.serve")
        return "Serving at" in session.log.read_text()

    try:
        until("the endpoint serves", serves, sign=lambda: session.log.stat().st_size)
        yield f"http://127.0.0.1:{port}"
    finally:
        session.stop()


def known(url: str) -> str:
    """Version of the router that the endpoint says it serves."""
    return httpx.get(f"{url}/healthz", timeout=30).json()["router_version"]


def version(url: str) -> str:
    """Version of the router that an image is generated with."""
    asked = {"prompt": "7", "seed": 7}
    answer = httpx.post(f"{url}/v1/images/generations", json=asked, timeout=60).raise_for_status()
    assert answer.json()["data"][0]["b64_json"]
    return answer.json()["router_version"]


def test_a_cluster_serves_what_another_has_trained(
    s3: S3Server, mlflow: MlflowServer, model: ModelConfig, tmp_path: Path
) -> None:
    """It follows to the next champion, with nothing deployed again and the training cluster gone."""
    homes = [tmp_path / "training", tmp_path / "serving"]
    with machines(homes[0], 2, s3, mlflow) as trainer, machines(homes[1], 1, s3, mlflow) as server:
        for own in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "HOME"):
            assert trainer.environment[own] != server.environment[own]
        train(trainer, "first", model, mlflow, workers=2)
        with serving(server, model) as url:
            assert version(url) == "1"
            train(trainer, "second", model, mlflow, workers=1)
            assert registry.resolve(NAME, registry.CHAMPION, mlflow.uri) == "2"
            trainer.stop()
            until("the new champion", lambda: known(url) == "2")
            assert version(url) == "2"
    stored = s3.stored()
    for run in ("first", "second"):
        assert f"runs/{run}/router/config.json" in stored
    kept = [{path.name for path in home.rglob("*.safetensors")} for home in homes]
    assert kept == [{"model.safetensors"}] * 2, "copies of the model, and no router"
