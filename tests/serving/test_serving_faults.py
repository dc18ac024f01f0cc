"""What an operator of the endpoint lives through, done for real under constant load from another process.
Every answer is checked: its picture is, byte for byte, what its seed and its router draw in this process.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from cluster_runs import ROOT, kill, until, workers_of
from local_cluster import LocalCluster
from mlflow_server import MlflowServer
from processes import Session, free_port
from s3_server import BUCKET, S3Server, s3_server
from serving_load import ALL_ASK, SEEDS, Answer, digest
from tiny_dit import make_artifact, write_model

from harmonica.core.golden_sample import record_sample
from harmonica.evaluation.plots import encode_picture
from harmonica.models.loading import load_model
from harmonica.samplers import make_sampler
from pipelines.serving.image_request import ImageRequest
from pipelines.serving.image_sampler import ImageSampler
from pipelines.tracking import registry
from pipelines.tracking.mlflow_runs import find_or_create, make_client

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
logger = logging.getLogger(__name__)
NAME, CLIENTS = "tiny", 4
SAMPLER, API = "ray::ServeReplica:harmonica:Sampler", "ray::ServeReplica:harmonica:Api"


class Endpoint:
    """Two replicas of each kind on a head and a worker node, following MLflow."""

    def __init__(self, folder: Path, cluster: LocalCluster, mlflow: MlflowServer) -> None:
        self.folder, self.cluster, self.mlflow = folder, cluster, mlflow
        self.model = write_model(folder / "model")
        self.expected: dict[tuple[str, int], str] = {}
        self.images = ImageSampler(load_model(self.model))
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def register(self, seed: int) -> str:
        """A router with this seed, as the champion; its version."""
        artifact = make_artifact(self.model, seed=seed)
        artifact = record_sample(artifact, make_sampler(self.images.model, artifact.sampler))
        run = find_or_create("register", f"run-{seed}", str(self.folder), {})
        saved = artifact.save(self.folder / f"router-{seed}")
        version = registry.register(saved, name=NAME, run=run)
        router = self.images.make_plan(artifact, version)
        self.images.use(router)
        for number in SEEDS:  # its class too
            picture = encode_picture(self.images.generate([ImageRequest(number, number, 0)])[0])
            self.expected[version, number] = digest(picture)
        return version

    def start(self) -> None:
        command = [sys.executable, "-m", "pipelines.serve", f"--serve.port={self.port}"]
        command += ["--serve.min-replicas=2", "--serve.max-replicas=2", "--serve.api-replicas=2"]
        command += ["--serve.reproducible"]  # or company may tip a grey level on some CPUs
        command += [f"--model.path={self.model.path}", f"--registered-model={NAME}"]
        environment = self.cluster.environment | {"MLFLOW_TRACKING_URI": self.mlflow.uri}
        self.session = Session(command, environment, self.folder / "serve.log")
        until("the endpoint serves", self._serves)

    def _serves(self) -> bool:
        self.session.check_alive("pipelines.serve")
        return "Serving at" in self.session.log.read_text()

    def pids(self, kind: str) -> list[int]:
        return [pid for node in self.cluster.nodes for pid in workers_of(node, kind)]

    def version(self) -> str:
        return httpx.get(f"{self.url}/healthz", timeout=30).json()["router_version"]

    def wait_whole(self) -> None:
        def is_whole() -> bool:
            kinds = (len(self.pids(SAMPLER)), len(self.pids(API)))
            return kinds == (2, 2) and httpx.get(f"{self.url}/readyz", timeout=30).status_code == 200

        until("two replicas of each kind", is_whole)
        time.sleep(1)  # the last to start is among those that are asked

    @contextmanager
    def load(self, name: str) -> Iterator[list[Answer]]:
        """Filled, and checked, at the end."""
        output, answers = self.folder / f"{name}.json", []
        command = [
            sys.executable,
            str(ROOT / "tests" / "support" / "serving_load.py"),
            self.url,
            str(CLIENTS),
            str(output),
        ]
        session = Session(command, os.environ, self.folder / f"{name}.log")
        try:
            until("every client is answered", lambda: ALL_ASK in (self.folder / f"{name}.log").read_text())
            time.sleep(1)
            yield answers
            time.sleep(3)
        finally:
            session.process.send_signal(signal.SIGTERM)
            session.process.wait(120)
        answers += [Answer(**each) for each in json.loads(output.read_text())]
        failed = [answer for answer in answers if answer.status != 200]
        wrong = [
            answer
            for answer in answers
            if answer.status == 200 and answer.digest != self.expected[answer.version, answer.seed]
        ]
        longest = max(answer.seconds for answer in answers)
        logger.info("%s: %d asked, %d failed, longest %.1f s", name, len(answers), len(failed), longest)
        assert failed == [] and wrong == []
        assert len(answers) > 20


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def endpoint(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("serving")
    # On one machine the nodes' proxies need ports of their own.
    environment = s3.environment | {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(free_port())}
    mlflow = MlflowServer(folder / "mlflow", artifacts=f"s3://{BUCKET}/mlflow", environment=s3.environment)
    with mlflow, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow.uri)
        with LocalCluster(workers=1, head_cpus=3, worker_cpus=2, environment=environment) as cluster:
            endpoint = Endpoint(folder, cluster, mlflow)
            endpoint.register(1)
            try:
                endpoint.start()
                yield endpoint
            finally:
                endpoint.session.stop()


def test_nothing_happens(endpoint: Endpoint):
    endpoint.wait_whole()
    with endpoint.load("nothing"):
        time.sleep(5)
    assert "Downloading" not in endpoint.session.log.read_text(), "MLflow's progress bar"


@pytest.mark.parametrize("kind", [SAMPLER, API], ids=["sampler", "ingress"])
def test_kill_of_a_replica(endpoint: Endpoint, kind: str):
    endpoint.wait_whole()
    with endpoint.load("sampler" if kind == SAMPLER else "ingress"):
        kill(endpoint.pids(kind)[0])
        endpoint.wait_whole()


def test_change_of_champion_and_back_by_alias(endpoint: Endpoint):
    endpoint.wait_whole()
    with endpoint.load("champion") as answers:
        asked = time.monotonic()
        version = endpoint.register(2)
        until("the new champion", lambda: endpoint.version() == version)
        logger.info("the new champion serves after %.1f s", time.monotonic() - asked)
        time.sleep(7)
        make_client(endpoint.mlflow.uri).set_registered_model_alias(NAME, registry.CHAMPION, "1")
        until("the old champion", lambda: endpoint.version() == "1")
        time.sleep(7)
    assert [answers[0].version, answers[-1].version] == ["1", "1"]
    assert {answer.version for answer in answers} == {"1", version}


@pytest.mark.parametrize("what", ["mlflow", "s3"])
def test_what_is_followed_is_down(endpoint: Endpoint, s3: S3Server, what: str):
    endpoint.wait_whole()
    with endpoint.load(what):
        endpoint.mlflow.kill() if what == "mlflow" else s3.stop()
        try:
            time.sleep(15)
            assert endpoint.version() == "1"
        finally:
            endpoint.mlflow.start() if what == "mlflow" else s3.start()


def test_kill_of_a_node(endpoint: Endpoint):
    """The last: it takes the node away."""
    endpoint.wait_whole()
    node = endpoint.cluster.nodes[1]
    assert workers_of(node, "ray::ServeReplica:harmonica"), "nothing of the endpoint is on it"
    with endpoint.load("node"):
        node.kill()
        endpoint.cluster.nodes.remove(node)
        endpoint.wait_whole()
