"""The end of `python -m pipelines.serve` on a private cluster."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import fork_client
import httpx
import pytest
from cluster_runs import until
from processes import Session, free_port
from tiny_dit import make_artifact, write_model


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[Session]:
    """`python -m pipelines.serve` of a tiny model, once it serves."""
    model = write_model(folder / "model")
    router = make_artifact(model).save(folder / "router")
    command = [sys.executable, "-m", "pipelines.serve", *arguments]
    command += [f"--model.path={model.path}", f"--router={router}", "--registered-model=tiny"]
    # A fork would be in another session than its processes.
    left_out = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", fork_client.ADDRESS)
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    session = Session(command, environment, folder / "serve.log")
    try:
        session.wait_until(lambda: "Ctrl-C stops it" in session.log.read_text(), 400, "pipelines.serve")
        yield session
    finally:
        session.kill()


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_for_the_command_and_for_all_that_it_started(tmp_path):
    """systemd, `timeout` and batch systems send it to all. Ray's processes may end before the command."""
    with started(tmp_path, f"--serve.port={free_port()}") as session:
        pids = session.pids()
        assert len(pids) > 5
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        assert session.process.wait(300) == 0, session.log.read_text()[-2000:]
        assert "Traceback" not in session.log.read_text()
        until("nothing runs any more", lambda: session.pids() == [])


def ask_for_an_image(url: str) -> int:
    asked = {"prompt": "Bag", "seed": 1, "timeout_s": 60}
    return httpx.post(f"{url}/v1/images/generations", json=asked, timeout=300).status_code


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_for_the_command_alone_lets_a_request_take_longer_than_serve_s_own_20_s(tmp_path):
    port = free_port()
    with started(tmp_path, f"--serve.port={port}") as session, ThreadPoolExecutor(1) as client:
        (sampler,) = session.pids("ray::ServeReplica:harmonica:Sampler")
        os.kill(sampler, signal.SIGSTOP)
        try:
            answer = client.submit(ask_for_an_image, f"http://127.0.0.1:{port}")
            time.sleep(3)  # until it is with the replica, which cannot say so
            session.process.send_signal(signal.SIGTERM)
            time.sleep(25)
        finally:
            os.kill(sampler, signal.SIGCONT)
        assert answer.result(300) == 200
        assert session.process.wait(300) == 0, session.log.read_text()[-2000:]
