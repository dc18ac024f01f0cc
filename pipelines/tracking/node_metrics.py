"""Log the CPU, memory and GPUs of every node in the workflow's MLflow run.

An idle actor on each node reads them and a thread of the driver sends them under MLflow's own names, so that
training waits for neither. MLflow's own monitor stops for good if its server fails to answer once.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..runtime.ray_runtime import node_names
from .mlflow_runs import Point, StageRun
from .node_reader import NodeReader

logger = logging.getLogger(__name__)

_MOST_PENDING = 1000  # points kept while MLflow does not answer
_PATIENCE_S, _WAIT_S = 5.0, 0.5
_END_S = 1.0  # `ray job stop` waits three seconds for all of it


class Nodes:
    """The nodes of a cluster are read by an actor on each; they may join and leave."""

    def __init__(self) -> None:
        self._readers: dict[str, Any] = {}

    def read(self, stopped: threading.Event) -> dict[str, float]:
        """Return the metrics of all nodes that answer before this is stopped.

        Names are such as `system/<node>/cpu_utilization_percentage`.
        """
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self._readers = {one: reader for one, reader in self._readers.items() if one in alive}
        for node_id in alive - self._readers.keys():
            there = NodeAffinitySchedulingStrategy(node_id, soft=False)
            options = {"num_cpus": 0, "scheduling_strategy": there}
            self._readers[node_id] = ray.remote(NodeReader).options(**options).remote()
        names = node_names()
        asked = {reader.read.remote(): node_id for node_id, reader in self._readers.items()}
        answered: list[Any] = []
        deadline = time.monotonic() + _PATIENCE_S
        # Little by little, since a thread that waits for Ray at the end of its process would crash it.
        while len(answered) < len(asked) and not stopped.is_set() and time.monotonic() < deadline:
            answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_WAIT_S)
        metrics: dict[str, float] = {}
        for reference in answered:
            node_id = asked[reference]
            try:
                found = ray.get(reference)
            except ray.exceptions.RayError:  # node or reader is gone: a new one next time
                del self._readers[node_id]
                continue
            metrics |= {f"system/{names[node_id]}/{name}": value for name, value in found.items()}
        return metrics


def _watch(run: StageRun, interval_s: float, stopped: threading.Event) -> None:
    nodes, pending, has_warned = Nodes(), deque[Point](maxlen=_MOST_PENDING), False
    while not stopped.wait(interval_s):
        try:
            metrics = nodes.read(stopped)
            # Steps are seconds of a clock, and so go on after a restart; curves of nodes share them.
            pending.append(Point(int(time.time()), int(time.time() * 1000), metrics))
            run.log_points(list(pending))
            pending.clear()
        except Exception as error:  # of Ray, or of MLflow; no reason to end a run
            if not has_warned:
                logger.warning("metrics of the nodes wait for MLflow (%s)", type(error).__name__)
            has_warned = True


@contextmanager
def node_metrics(run: StageRun, interval_s: float) -> Iterator[None]:
    """Log every node's metrics to `run` while the body runs.

    Args:
        interval_s: seconds between two logs; 0 logs none.
    """
    if not interval_s:
        yield
        return
    stopped = threading.Event()
    thread = threading.Thread(target=_watch, args=(run, interval_s, stopped), daemon=True, name="nodes")
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(_END_S)
