"""Training runs of `workflow.py` on a real cluster of several nodes, as processes that can be killed."""

import dataclasses
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
from typing import Any

import numpy as np
import torch
from fork_client import fork_of
from local_cluster import LocalCluster
from processes import Session
from router_only import ROUTER_ONLY, ROUTER_ONLY_FLAGS
from tolerances import of_training

from harmonica.data.samples import Shard, make_samples
from harmonica.models.loading import ModelConfig
from harmonica.samplers import SamplerConfig
from pipelines import workflow
from pipelines.presets import fashion
from pipelines.run_state.routers import load_router
from pipelines.run_state.storage import RunStorage
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.jobs import start_run

logger = logging.getLogger(__name__)

ROOT = Path(workflow.__file__).parents[1]
TRAJECTORIES = 14
LEARNING_RATE = 0.01
"""The paper's; the preset's is 15 times that, and multiplies roundings as much."""
LONGER: dict[str, Any] = {"trajectories": 60, "learning_rate": 0.002}
"""For what takes its time while training goes on; small steps, since many multiply roundings."""
SETTINGS = [
    *ROUTER_ONLY_FLAGS,
    "--sampler.num-inference-steps=6",
    "--train.batch-size=4",
    "--train.iepo-every=5",
    "--train.checkpoint-interval-s=0",
    "--train.placement-strategy=SPREAD",
]
_WAIT_S = 200.0  # without a sign of work; pytest's own limit is what bounds all of it
TRAIN_WORKER = "RayTrainWorker"
_RUN = """select run.run_uuid from tags run join tags stage on stage.run_uuid = run.run_uuid
    where run.key = 'harmonica.run_id' and run.value = ?
    and stage.key = 'harmonica.stage' and stage.value = ?"""
Curves = dict[str, list[tuple[int, float]]]


def workers_of(node: Session, name: str) -> list[int]:
    """Process ids of a node's workers with this in their names, forks among them (support/forks)."""
    forks = [fork for pid in node.pids() if (fork := fork_of(pid))]
    return [*node.pids(name), *(pid for pid in forks if name in _program(pid))]


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]
    except OSError:  # it ended meanwhile
        return ""


def until(
    what: str,
    holds: Callable[[], object],
    timeout_s: float = _WAIT_S,
    sign: Callable[[], object] = lambda: None,
) -> None:
    """Wait for it, and lose patience only `timeout_s` after `sign()` last changed.

    However long work takes on a busy machine, it shows that it goes on.
    """
    seen, since = sign(), time.monotonic()
    while not holds():
        if (now := sign()) != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since > timeout_s:
            raise TimeoutError(f"{what} is not so {timeout_s:.0f} s after the last sign of work: {seen}")
        time.sleep(0.1)


class TrainingRun:
    """One run id, its storage and its driver."""

    def __init__(
        self,
        cluster: LocalCluster,
        model: ModelConfig,
        folder: Path,
        name: str,
        *,
        storage_path: str = "",
        mlflow: str = "",
        trajectories: int = TRAJECTORIES,
        learning_rate: float = LEARNING_RATE,
    ) -> None:
        self.cluster, self.folder, self.trajectories = cluster, folder, trajectories
        self.storage = RunStorage(storage_path or str(folder / "runs"), name)
        self.database = folder / "mlflow.db"
        self._broken_at: float | None = None
        self.log = folder / f"{name}.log"
        self._environment = cluster.environment | {
            "MLFLOW_TRACKING_URI": mlflow or f"sqlite:///{self.database}",
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
        }
        self.command = [sys.executable, str(ROOT / "workflow.py"), "fashion", f"--run-id={name}"]
        self.command += [f"--storage-path={self.storage.root}", f"--model.path={model.path}", *SETTINGS]
        self.command += [f"--train.trajectories={trajectories}"]
        self.command += [f"--train.sdt.learning-rate={learning_rate}"]

    def start(self, *arguments: str, stages: tuple[str, ...] = ("train",)) -> None:
        command = [*self.command, *arguments, "--stages", *stages]
        self.driver = Session(command, self._environment, self.log)

    def breaks(self) -> None:
        """From here on the time is taken until the next checkpoint."""
        self._broken_at = time.monotonic()

    def wait(self) -> int:
        """Exit code; at `--log-cli-level=INFO` the longest pause between checkpoints since the fault."""
        seen, changed, pause = self.trajectory, self._broken_at or time.monotonic(), 0.0
        self._broken_at = None

        def ended() -> bool:
            nonlocal seen, changed, pause
            if (now := self.trajectory) != seen:
                pause = max(pause, time.monotonic() - changed)
                seen, changed = now, time.monotonic()
            return self.driver.process.poll() is not None

        # Checkpoints, since the trajectory is known from `ended` anyway, and lines of the log.
        until("the driver's end", ended, sign=lambda: (seen, self.log.stat().st_size))
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
        folder = Checkpoints.of_training(self.storage).folder
        return max((int(name[:9]) for name in self.storage.names(folder)), default=0)

    def wait_for(self, trajectory: int) -> None:
        def reached() -> bool:
            if self.driver.process.poll() is not None:
                raise AssertionError(f"the driver has ended:\n{self.said[-3000:]}")
            nonlocal newest
            newest = self.trajectory
            return newest >= trajectory

        newest = 0
        until(f"trajectory {trajectory}", reached, sign=lambda: (newest, self.log.stat().st_size))
        assert self.trajectory < self.trajectories, "too late to break anything"

    @property
    def pid(self) -> int:
        """Of the driver, or of the fork in its place (support/forks)."""
        started = self.driver.process.pid
        return fork_of(started) or started

    def workers(self, node: int) -> list[int]:
        """Process ids of the training workers on a node."""
        return workers_of(self.cluster.nodes[node], TRAIN_WORKER)

    @contextmanager
    def paused(self, node: int) -> Iterator[None]:
        """Stop the node's training workers in the meantime, since a fast machine would be done training."""
        stopped = self.workers(node)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)

    @property
    def router(self) -> torch.Tensor:
        return load_router(self.storage, "router").logits_TB

    def curves(self, database: Path | None = None) -> Curves:
        """Every metric of training that is not a time: (step, value) of all points that MLflow has."""
        query = f"""select key, step, value from metrics where run_uuid = ({_RUN}) order by key, step"""
        found: Curves = {}
        for name, step, value in self._select(query, "train", database):
            if not name.startswith("worker.") and name != "updates_per_s":
                found.setdefault(name, []).append((step, value))
        return found

    def metrics(self, stage: str, pattern: str) -> Curves:
        """Of a stage, those that are like the pattern."""
        query = f"select key, step, value from metrics where run_uuid = ({_RUN}) and key like '{pattern}'"
        found: Curves = {}
        for name, step, value in self._select(query + " order by key, step", stage):
            found.setdefault(name, []).append((step, value))
        return found

    @property
    def nodes(self) -> int:
        """How many had a training worker of this run, the last time that it started."""
        query = f"select value from tags where run_uuid = ({_RUN}) and key = 'harmonica.workers'"
        ((said,),) = self._select(query, "train")
        return len(said.split(";"))

    @property
    def statuses(self) -> set[str]:
        """Of its MLflow runs."""
        query = """select status from runs join tags using (run_uuid)
            where tags.key = 'harmonica.run_id' and tags.value = ? and ? = ''"""
        return {status for (status,) in self._select(query, "")}

    def _select(self, query: str, stage: str, database: Path | None = None) -> list[tuple]:
        with sqlite3.connect(database or self.database) as connection:
            return connection.execute(query, (self.storage.run_id, stage)).fetchall()

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


def check_same(run: TrainingRun, other: TrainingRun, database: Path | None = None) -> None:
    """Router and whole curves, bit for bit."""
    assert torch.equal(run.router, other.router)
    assert run.curves(database) == other.curves()


def check_close(run: TrainingRun, curves: Curves, router: torch.Tensor, lambda_rtol: float = 1e-5) -> None:
    """To what the order of sums may change.

    Args:
        lambda_rtol: lambda is made of differences of nearly equal images, and has their roundings.
    """
    ours = run.curves()
    assert ours.keys() == curves.keys()
    for name, points in curves.items():
        rtol = lambda_rtol if name.startswith("lambda.") else 1e-5
        np.testing.assert_allclose(ours[name], points, rtol=rtol, err_msg=f"{run.storage.run_id} {name}")
    torch.testing.assert_close(run.router, router, **of_training(LEARNING_RATE, TRAJECTORIES))


def trained_alone(
    model: ModelConfig, trajectories: int = TRAJECTORIES, learning_rate: float = LEARNING_RATE
) -> tuple[Curves, torch.Tensor]:
    """The same training in this process, without Ray: curves and router."""
    base = fashion()
    sdt = dataclasses.replace(base.train.sdt, learning_rate=learning_rate)
    changes = ROUTER_ONLY | {"trajectories": trajectories, "batch_size": 4, "iepo_every": 5, "sdt": sdt}
    train = dataclasses.replace(base.train, **changes)
    sampler = SamplerConfig(num_inference_steps=6)
    config = dataclasses.replace(base, model=model, sampler=sampler, train=train)
    run, spec = start_run(config, torch.device("cpu"))
    shard = Shard(4)
    curves: Curves = {}
    while run.trajectory < trajectories:
        batch = spec.to_batch(make_samples(shard.indices(np.arange(4), run.trajectory), spec), "cpu")
        for name, value in run.train_one(batch).items():
            if not name.startswith("seconds.") and name != "updates_per_s":
                curves.setdefault(name, []).append((run.trajectory, value))
    return curves, run.router.logits()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
