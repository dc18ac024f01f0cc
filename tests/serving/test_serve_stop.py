"""The end of `python -m pipelines.serve` on a private cluster."""

import os
import signal
import sys
from contextlib import suppress

import fork_client
import pytest
from cluster_runs import until
from processes import Session, free_port
from tiny_dit import make_artifact, write_model


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_for_the_command_and_for_all_that_it_started(tmp_path):
    """systemd, `timeout` and batch systems send it to all. Ray's processes may end before the command."""
    model = write_model(tmp_path / "model")
    router = make_artifact(model).save(tmp_path / "router")
    command = [sys.executable, "-m", "pipelines.serve", f"--serve.port={free_port()}"]
    command += [f"--model.path={model.path}", f"--router={router}", "--registered-model=tiny"]
    # A fork would be in another session than its processes.
    left_out = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", fork_client.ADDRESS)
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    session = Session(command, environment, tmp_path / "serve.log")
    try:
        session.wait_until(lambda: "Ctrl-C stops it" in session.log.read_text(), 400, "pipelines.serve")
        pids = session.pids()
        assert len(pids) > 5
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        assert session.process.wait(300) == 0, session.log.read_text()[-2000:]
        assert "Traceback" not in session.log.read_text()
        until("nothing runs any more", lambda: session.pids() == [])
    finally:
        session.kill()
