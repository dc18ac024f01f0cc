"""Runs that are stopped, by Ctrl-C, signals and as jobs: nothing keeps running, and they can be resumed."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ray
from cluster_runs import (
    LONGER,
    ROOT,
    TrainingRun,
    check_close,
    check_same,
    closing,
    trained_alone,
    until,
)
from local_cluster import LocalCluster
from tiny_dit import write_model

from pipelines.training.checkpoints import FOLDER

_ENDED = re.compile("SUCCEEDED|FAILED|STOPPED")
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]


def test_ctrl_c_and_sigterm_leave_a_run_that_goes_on_from_the_newest_whole_checkpoint(
    make_run, unbroken: TrainingRun
) -> None:
    # Ignored signals are inherited, from a shell's background job for one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with closing(make_run("stopped")) as run:
        for number, code, trajectory in ((signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 6)):
            run.start()
            run.wait_for(trajectory)
            run.driver.process.send_signal(number)
            assert run.wait() == code, run.said
            assert "interrupted: the same command with --run-id stopped goes on from here" in run.said
            assert run.statuses == {"KILLED"}
            run.cluster_is_idle()
        newest = Path(run.storage.uri(FOLDER)) / run.storage.names(FOLDER)[-1]
        newest.write_bytes(newest.read_bytes()[:-100])
        run.complete()
        assert f"{newest.name} is damaged" in run.said, run.said
        assert run.statuses == {"FINISHED"}
        check_same(run, unbroken)


@pytest.fixture(scope="module")
def job(cluster: LocalCluster):
    """`ray job`, from a folder of its own, as another user than the cluster's where that can be."""
    folder = Path(tempfile.mkdtemp(prefix="jobs-", dir="/tmp"))  # one that the other user may enter
    kept = ("RAY_AUTH", "RAY_API", "RAY_USAGE")
    environment = {name: value for name, value in cluster.environment.items() if name.startswith(kept)}
    packages = str(Path(ray.__file__).parents[1])
    environment |= {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": packages}
    python, user = _python_of_another_user(environment)
    shutil.chown(folder, user or os.getuid())

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [python, "-m", "ray.scripts.scripts", "job", *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, user=user, capture_output=True, text=True, check=False
        )

    yield run
    shutil.rmtree(folder)


def _python_of_another_user(environment: dict[str, str]) -> tuple[str, str | None]:
    if os.geteuid() == 0:
        # The one that runs here may lie where no other user may look.
        for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                subprocess.run([python, "-c", "import ray"], env=environment, user="nobody", check=True)
                return python, "nobody"
    return sys.executable, None


def test_a_job_is_stopped_and_submitted_again(job, make_run, folder: Path) -> None:
    with closing(make_run("job", **LONGER)) as run:
        env = {"env_vars": {"MLFLOW_TRACKING_URI": f"sqlite:///{run.database}"}}
        submit = ["submit", f"--working-dir={ROOT}", f"--runtime-env-json={json.dumps(env)}"]
        command = ["--", "python", *run.command[1:], "--promote=always", "--registered-model=of-jobs"]
        command[2] = "workflow.py"  # that of the upload
        command += ["--stages", "train", "register"]

        asked = time.monotonic()

        def has_ended(name: str) -> bool:
            """Asked now and then, since each answer takes as much of a core as the start of a worker."""
            nonlocal asked
            if time.monotonic() - asked < 20:
                return False
            asked = time.monotonic()
            return bool(_ENDED.search(job("status", name).stdout))

        until("a job agent", lambda: "No available agent" not in job("list").stderr)
        first = job(*submit, "--submission-id=first", "--no-wait", *command)
        assert first.returncode == 0, first.stderr
        until("a checkpoint or the end", lambda: run.trajectory >= 1 or has_ended("first"))
        assert run.trajectory, job("logs", "first").stdout
        stopped = job("stop", "first")
        assert stopped.returncode == 0 and "was stopped" in stopped.stdout + stopped.stderr, stopped
        run.cluster_is_idle()
        assert run.trajectory < run.trajectories and run.statuses == {"KILLED"}

        refused = job(*submit, *command, "--train.batch-size=3")
        assert refused.returncode == 1 and "error: train.batch_size is 3" in refused.stdout, refused.stdout
        again = job(*submit, "--submission-id=again", *command)
        assert again.returncode == 0, again.stdout[-3000:]
        assert "resumed after trajectory" in again.stdout and "succeeded" in again.stdout
        assert "version 1 of of-jobs is the champion" in again.stdout
        said = re.sub(r"\x1b\[[0-9;]*m", "", again.stdout)
        assert "Reporting training result" not in said and "it/s" not in said, "readable"
        check_close(run, *trained_alone(write_model(folder / "same"), **LONGER), lambda_rtol=1e-4)
