"""Training that goes on with the workers there is room for: from one node's worth to two's and back."""

from pathlib import Path

import pytest
from cluster_runs import LONGER, TrainingRun, check_close, closing, trained_alone, until
from local_cluster import LocalCluster
from tiny_dit import write_model

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_node_that_comes_and_a_node_that_goes(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with LocalCluster(workers=0, head_cpus=1, worker_cpus=1) as cluster:
        with closing(TrainingRun(cluster, model, tmp_path, "elastic", **LONGER)) as run:
            run.start("--train.num-workers=2", "--train.min-workers=1", "--train.resize-interval-s=2")
            run.wait_for(4)
            assert len(run.workers(0)) == 1, "one node's worth"
            with run.paused(0):
                node = cluster.add_node()
            until("a worker on each node", lambda: run.workers(0) and run.workers(1))
            grown = run.trajectory
            run.wait_for(grown + 4)
            run.breaks()
            node.kill()
            until("the loss is noticed", lambda: len(run.workers(0)) == 1)
            assert run.wait() == 0, run.said
            assert run.nodes == 1, "no room for the other one"
        check_close(run, *trained_alone(model, **LONGER), lambda_rtol=1e-4)
