"""What is read off a node, and that readings wait for an MLflow that does not answer."""

import dataclasses
import threading
import time

import psutil
import pytest

from pipelines.tracking import node_metrics
from pipelines.tracking.mlflow_runs import Point, StageRun
from pipelines.tracking.node_reader import NodeReader, gpu_metrics


def test_a_reading_has_the_node_s_cpus_and_memory() -> None:
    reader = NodeReader()
    reader._nvidia = None
    metrics = reader.read()
    assert 0 <= metrics["cpu_utilization_percentage"] <= 100
    assert 0 < metrics["system_memory_usage_percentage"] < 100
    used = metrics["system_memory_usage_percentage"] / 100 * psutil.virtual_memory().total
    assert metrics["system_memory_usage_megabytes"] == pytest.approx(used / 1e6)


def test_gpus_are_read_off_nvidia_smi_and_what_one_hides_is_left_out() -> None:
    said = "0, 37, 1024, 4096, 250.5\n1, 0, 0, 4096, [N/A]\n2, [N/A], [N/A], [N/A], 60\n"
    assert gpu_metrics(said) == {
        "gpu_0_utilization_percentage": 37,
        "gpu_0_power_usage_watts": 250.5,
        "gpu_0_memory_usage_megabytes": pytest.approx(1073.74, abs=0.01),
        "gpu_0_memory_usage_percentage": 25,
        "gpu_1_utilization_percentage": 0,
        "gpu_1_memory_usage_megabytes": 0,
        "gpu_1_memory_usage_percentage": 0,
        "gpu_2_power_usage_watts": 60,
    }
    assert gpu_metrics("") == {}


@dataclasses.dataclass(frozen=True)
class FlakyRun(StageRun):
    """Its server does not answer the first two times."""

    requests: list[list[Point]] = dataclasses.field(default_factory=list)

    def log_points(self, points) -> None:
        self.requests.append(points)
        if len(self.requests) < 3:
            raise ConnectionError


class OneNode:
    def read(self, stopped: threading.Event) -> dict[str, float]:
        return {"system/here/cpu_utilization_percentage": 1.0}


def test_readings_wait_for_mlflow(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(node_metrics, "Nodes", OneNode)
    run = FlakyRun("http://127.0.0.1:1", "id")
    with node_metrics.node_metrics(run, 0.01):
        while len(run.requests) < 4:
            time.sleep(0.01)
    assert [len(points) for points in run.requests[:4]] == [1, 2, 3, 1]
    assert caplog.text.count("metrics of the nodes wait for MLflow (ConnectionError)") == 1
    assert "nodes" not in {thread.name for thread in threading.enumerate()}
    with node_metrics.node_metrics(run, 0):
        assert "nodes" not in {thread.name for thread in threading.enumerate()}
