"""A node whose agent needs longer than Ray's raylet waits for it, once: the node is started again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from local_cluster import LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
SLOW = """
import os, sys, time
from pathlib import Path

first = Path(__file__).with_name("first")
if any(argument.endswith("dashboard/agent.py") for argument in sys.orig_argv) and not first.exists():
    first.write_text(str(os.getpid()))
    time.sleep(60)
"""
DRIVER = """
import ray
from pipelines.runtime.ray_runtime import connect

connect()
print("answer", ray.get(ray.remote(lambda: 6 * 7).remote()))
"""


@pytest.fixture
def slow_agent(tmp_path: Path) -> dict[str, str]:
    """An environment in which the first dashboard agent sleeps for a minute before it starts."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path}


def test_node_of_a_local_cluster(slow_agent, tmp_path):
    with LocalCluster(workers=0, environment=slow_agent) as cluster:
        (node,) = cluster.nodes
        assert node.folder.name != "1"
        assert len(node.pids("raylet/raylet")) == 1
        assert not Path("/proc", (tmp_path / "first").read_text()).exists()


def test_private_cluster(slow_agent):
    environment = os.environ | slow_agent | {"RAY_raylet_start_wait_time_s": "30"}
    environment.pop("RAY_ADDRESS", None)
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=250
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "answer 42" in ended.stdout
    assert "starting it once more" in ended.stderr
