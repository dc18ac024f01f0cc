"""List limits of Ray, MLflow and this program, and when each binds.

The constants are read from the installed packages. What they are held against are rates: those of Ray's own
release tests (release/perf_metrics in Ray's repository: microbenchmark.json, benchmarks/many_actors.json and
benchmarks/many_nodes.json, of Ray 2.x on machines unlike yours), one of tests/benchmarks/RESULTS.md, and one
assumption, which is called so. A cluster of n nodes has n times `gpus_per_node` GPUs, which all train one
router or all serve one model at full load.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..config.serve import ServeConfig
from ..config.workflow import TrainConfig
from .gpus import Gpu
from .serving import ServingEstimate
from .sizes import SizedModel
from .training import forward_in_training, reduce_seconds

ACTOR_CALLS_PER_S = 4260.0
"""Calls that one asynchronous actor takes from another: `1_1_async_actor_calls_async`."""
DRIVER_CALLS_PER_S = 7383.0
"""Calls that one process makes to many asynchronous actors: `1_n_async_actor_calls_async`."""
ACTORS_PER_S = 551.0
"""Actors that a cluster starts in a second: `many_actors`."""
TASKS_PER_S = 192.0
"""Tasks that a cluster of 250 nodes runs in a second: `many_nodes`."""
TESTED_NODES = 250
"""Nodes of Ray's release test `many_nodes`."""
API_REQUEST_S = 0.0123
"""Seconds that HTTP adds to a request (tests/benchmarks/RESULTS.md, "Serving"), which bound those that one
process of `Api` is busy."""
MLFLOW_REQUESTS_PER_S = 100.0
"""Requests that an MLflow server answers in a second: an assumption."""
_MOST_NODES = 1_000_000
_METRICS_PER_TRAJECTORY = 6


@dataclass(frozen=True, slots=True)
class Limit:
    """A load that grows with the nodes, and what it may not exceed."""

    name: str
    capacity: float
    unit: str
    where: str
    load: Callable[[int], float]
    """Load of a number of nodes."""
    answer: str
    """What the program does about it."""

    @property
    def binds_at(self) -> int | None:
        """Return the fewest nodes that exceed the limit, None if a million do not."""
        if self.load(_MOST_NODES) <= self.capacity:
            return None
        low, high = 0, _MOST_NODES
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.load(middle) > self.capacity else (middle, high)
        return high


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The training and serving for which limits are computed."""

    model: SizedModel
    gpu: Gpu
    gpus_per_node: int
    train: TrainConfig
    serve: ServeConfig
    serving: ServingEstimate
    follow_s: float
    num_steps: int
    network_bytes_per_s: float

    def gpus(self, nodes: int) -> int:
        return nodes * self.gpus_per_node

    def update_s(self, nodes: int) -> float:
        """Return the seconds of an update, without its all-reduce."""
        images = max(1.0, self.train.batch_size / self.gpus(nodes))
        return 3 * forward_in_training(self.model, self.gpu, images, 1)

    def trajectory_s(self, nodes: int) -> float:
        return (self.num_steps - 1) * self.update_s(nodes)


def training_limits(cluster: Cluster) -> Iterator[Limit]:
    """Yield the limits of one router's training on all GPUs."""
    from mlflow.utils.validation import MAX_METRICS_PER_BATCH
    from ray.train.v2._internal import constants

    train, gpus = cluster.train, cluster.gpus
    yield Limit(
        "workers that share a batch",
        train.batch_size,
        "workers",
        "train.batch_size, pipelines/config/workflow.py",
        gpus,
        "refuses workers that do not divide the batch, before anything starts; the stage sweep trains "
        "several routers side by side, and a larger train.batch_size feeds more workers",
    )
    gradient = 4 * cluster.model.num_branches
    yield Limit(
        "all-reduce of a row, share of an update",
        0.1,
        "",
        f"{gradient} bytes an update, harmonica/training/sdt.py",
        lambda n: reduce_seconds(gpus(n), gradient, cluster.network_bytes_per_s) / cluster.update_s(n),
        "sends B numbers an update, and no weights; micro-batches send nothing of their own",
    )
    interval = constants.DEFAULT_HEALTH_CHECK_INTERVAL_S
    yield Limit(
        f"Train controller's polls, every worker each {interval:g} s",
        DRIVER_CALLS_PER_S,
        "calls/s",
        "DEFAULT_HEALTH_CHECK_INTERVAL_S, ray/train/v2/_internal/constants.py",
        lambda n: gpus(n) / interval,
        "nothing: late polls only notice a failure late; RAY_TRAIN_HEALTH_CHECK_INTERVAL_S makes them rarer",
    )
    timeout = constants.DEFAULT_WORKER_GROUP_START_TIMEOUT_S
    yield Limit(
        "start of all workers",
        timeout,
        "s",
        "DEFAULT_WORKER_GROUP_START_TIMEOUT_S, ray/train/v2/_internal/constants.py",
        lambda n: gpus(n) / ACTORS_PER_S,
        "an elastic run goes on with the workers that there is room for, after 15 s; "
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S allows more",
    )
    yield Limit(
        "workers' reports to the board, two a trajectory",
        ACTOR_CALLS_PER_S,
        "calls/s",
        "tell, pipelines/training/stage.py",
        lambda n: 2 * gpus(n) / cluster.trajectory_s(n),
        "workers do not wait for the answers; a late report only delays the line of progress",
    )
    yield Limit(
        "metrics of a request to MLflow",
        MAX_METRICS_PER_BATCH,
        "metrics",
        "MAX_METRICS_PER_BATCH, mlflow/utils/validation.py",
        lambda n: _METRICS_PER_TRAJECTORY * train.checkpoint_interval_s / cluster.trajectory_s(n),
        "rank 0 alone sends them, at checkpoints, in as many requests as needed; what MLflow does not take "
        "waits in the checkpoint",
    )
    block = max(1, min(256, 32 * 2**20 // cluster.model.sample_bytes))
    yield Limit(
        "Ray Data's tasks, one a block of rows",
        TASKS_PER_S,
        "tasks/s",
        f"{block} rows a block, pipelines/data/stream.py",
        lambda n: max(train.batch_size, gpus(n)) / block / cluster.trajectory_s(n),
        "makes blocks of up to 32 MiB ahead of training, two at a time for each worker",
    )


def serving_limits(cluster: Cluster) -> Iterator[Limit]:
    """Yield the limits of one model's serving on all GPUs."""
    from ray.serve._private import constants

    from ..serving.application import API_MAX_ONGOING, HEALTH_CHECK_PERIOD_S

    serve, gpus, plan = cluster.serve, cluster.gpus, cluster.serving
    images_per_s = plan.batch / plan.batch_s
    yield Limit(
        "requests that `Api` holds, two batches a replica",
        float(API_MAX_ONGOING * serve.api_replicas),
        "requests",
        "max_ongoing_requests, pipelines/serving/application.py",
        lambda n: gpus(n) * 2 * plan.batch,
        "answers 503 beyond it; serve.api_replicas adds as many again each",
    )
    yield Limit(
        "requests that `Api` answers",
        serve.api_replicas / API_REQUEST_S,
        "requests/s",
        "serve.api_replicas, pipelines/config/serve.py",
        lambda n: gpus(n) * images_per_s,
        "splits a request of n images behind HTTP, so that n cost one; serve.api_replicas adds processes",
    )
    yield Limit(
        f"replicas' looks at the registry, two each {cluster.follow_s:g} s",
        MLFLOW_REQUESTS_PER_S,
        "requests/s",
        "FOLLOW_S, pipelines/serving/serve_args.py",
        lambda n: 2 * gpus(n) / cluster.follow_s,
        "keeps the router in use while MLflow does not answer; follow_s of the application makes looks rarer",
    )
    yield Limit(
        "Serve controller's checks, all replicas each loop's share",
        DRIVER_CALLS_PER_S * constants.CONTROL_LOOP_INTERVAL_S,
        "calls/loop",
        "CONTROL_LOOP_INTERVAL_S, ray/serve/_private/constants.py; health_check_period_s, "
        "pipelines/serving/application.py",
        lambda n: (gpus(n) + serve.api_replicas) * constants.CONTROL_LOOP_INTERVAL_S / HEALTH_CHECK_PERIOD_S,
        "allows 30 s for a check that is due every 2 s: a slow controller replaces no good replica",
    )
    yield Limit(
        "Serve controller's long polls, two a proxy and one a handle",
        float(constants.CONTROLLER_MAX_CONCURRENCY),
        "calls",
        "CONTROLLER_MAX_CONCURRENCY, ray/serve/_private/constants.py",
        lambda n: 2 * n + serve.api_replicas,
        "has one handle for each `Api` replica, and sampling replicas have none",
    )
    pushed_s = constants.RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S
    yield Limit(
        f"autoscaling metrics, a handle each {pushed_s:g} s",
        ACTOR_CALLS_PER_S,
        "calls/s",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S, ray/serve/_private/constants.py",
        lambda n: (n + serve.api_replicas) / pushed_s,
        "scales on serve.target_ongoing after serve.upscale_delay_s; the interval bounds how soon it notices",
    )


def cluster_limits() -> Iterator[Limit]:
    """Yield the limits of the cluster itself."""
    from ray._raylet import Config  # type: ignore[attr-defined]  # compiled

    period = Config.health_check_period_ms() / 1000
    yield Limit(
        "nodes of Ray's release test many_nodes",
        TESTED_NODES,
        "nodes",
        "release/perf_metrics/benchmarks/many_nodes.json in Ray's repository",
        lambda n: n,
        "separate clusters for training and serving, which meet in the registry and the storage",
    )
    yield Limit(
        f"GCS's health checks, a node each {period:g} s",
        DRIVER_CALLS_PER_S,
        "calls/s",
        "health_check_period_ms, ray_config_def.h (ray._raylet.Config)",
        lambda n: n / period,
        "nothing: a node counts as lost after five checks that fail",
    )


def all_limits(cluster: Cluster) -> list[Limit]:
    """Return all limits, those that bind first in front."""
    found = [*training_limits(cluster), *serving_limits(cluster), *cluster_limits()]
    return sorted(found, key=lambda limit: limit.binds_at or _MOST_NODES + 1)
