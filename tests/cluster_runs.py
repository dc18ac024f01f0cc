"""Training runs of `workflow.py` on a real cluster of several nodes, as processes that can be killed."""

import logging
import os
import re
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from local_cluster import LocalCluster
from processes import Session

import workflow
from harmonica.models.loading import ModelConfig
from pipelines.checkpoints import FOLDER
from pipelines.storage import RunStorage

logger = logging.getLogger(__name__)

ROOT = Path(workflow.__file__).parent
TRAJECTORIES = 14
SETTINGS = [
    "--sampler.num-inference-steps=6",
    f"--train.trajectories={TRAJECTORIES}",
    "--train.batch-size=4",
    "--train.iepo-every=5",
    "--train.checkpoint-interval-s=0",
    "--train.placement-strategy=SPREAD",
    # The paper's; the preset's is 15 times that, and multiplies roundings as much.
    "--train.sdt.learning-rate=0.01",
]
_WAIT_S = 200.0
TRAIN_WORKER = "RayTrainWorker"


def until(what: str, holds: Callable[[], bool], timeout_s: float = _WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} is not so after {timeout_s:.0f} s")
        time.sleep(0.1)


class TrainingRun:
    """One run id, its storage and its driver."""

    nodes_used = 0

    def __init__(
        self,
        cluster: LocalCluster,
        model: ModelConfig,
        folder: Path,
        name: str,
        *,
        storage_path: str = "",
        mlflow: str = "",
    ) -> None:
        self.cluster, self.folder = cluster, folder
        self.storage = RunStorage(storage_path or str(folder / "runs"), name)
        self.database = folder / "mlflow.db"
        self.log = folder / f"{name}.log"
        self._environment = cluster.environment | {
            "MLFLOW_TRACKING_URI": mlflow or f"sqlite:///{self.database}",
            "PYTHONPATH": str(ROOT),
        }
        self._command = [sys.executable, str(ROOT / "workflow.py"), "fashion", f"--run-id={name}"]
        self._command += [f"--storage-path={self.storage.root}", f"--model.path={model.path}", *SETTINGS]

    def start(self, *arguments: str, stages: tuple[str, ...] = ("train",)) -> None:
        command = [*self._command, *arguments, "--stages", *stages]
        self.driver = Session(command, self._environment, self.log)

    def wait(self) -> int:
        """Exit code; at `--log-cli-level=INFO` also the longest pause between checkpoints from here on."""
        seen, changed, pause = self.trajectory, time.monotonic(), 0.0

        def ended() -> bool:
            nonlocal seen, changed, pause
            if (now := self.trajectory) != seen:
                pause = max(pause, time.monotonic() - changed)
                seen, changed = now, time.monotonic()
            return self.driver.process.poll() is not None

        until("the driver's end", ended)
        logger.info("%s: longest pause %.0f s", self.storage.run_id, pause)
        return self.driver.process.wait()

    def complete(self, *arguments: str) -> "TrainingRun":
        """From here to the end."""
        self.start(*arguments)
        assert self.wait() == 0, self.said
        return self

    @property
    def said(self) -> str:
        """By all drivers of the run; without the terminal's colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text())

    @property
    def trajectory(self) -> int:
        """Of the newest checkpoint, 0 before the first."""
        return max((int(name[:9]) for name in self.storage.names(FOLDER)), default=0)

    def wait_for(self, trajectory: int) -> None:
        def reached() -> bool:
            if self.driver.process.poll() is not None:
                raise AssertionError(f"the driver has ended:\n{self.said[-3000:]}")
            return self.trajectory >= trajectory

        until(f"trajectory {trajectory}", reached)
        assert self.trajectory < TRAJECTORIES, "too late to break anything"

    def workers(self, node: int) -> list[int]:
        """Process ids of the training workers on a node."""
        return self.cluster.nodes[node].pids(TRAIN_WORKER)

    @property
    def router(self) -> torch.Tensor:
        from harmonica.artifact import RouterArtifact

        return RouterArtifact.load(self.storage.download_folder("router")).logits_TB

    def curve(self, metric: str, database: Path | None = None) -> list[tuple[int, float]]:
        """(step, value) of every point that MLflow's database has, in order."""
        query = """select metrics.step, metrics.value from metrics join tags using (run_uuid)
            where metrics.key = ? and tags.key = 'harmonica.run_id' and tags.value = ?
            and metrics.run_uuid in
                (select run_uuid from tags where key = 'harmonica.stage' and value = 'train')
            order by metrics.step"""
        with sqlite3.connect(database or self.database) as connection:
            return connection.execute(query, (metric, self.storage.run_id)).fetchall()

    def close(self) -> None:
        """Whatever still runs."""
        if hasattr(self, "driver"):
            self.driver.kill()
            self.cluster_is_idle()

    def cluster_is_idle(self) -> None:
        """Wait until no training worker is left."""
        until("no training worker", lambda: not any(map(self.workers, range(len(self.cluster.nodes)))), 60)


@contextmanager
def closing(run: TrainingRun) -> Iterator[TrainingRun]:
    try:
        yield run
    finally:
        run.close()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
