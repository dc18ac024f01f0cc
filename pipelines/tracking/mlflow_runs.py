"""Make the MLflow runs: one for each workflow, and a nested one for each stage.

A restarted workflow goes on with the runs it has.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .mlflow_store import (
    EXPERIMENT,
    artifacts_of,
    database_of,
    signed_in,
    tracking_uri,
    without_credentials,
)

# Elsewhere where it is needed: all workers of a stage import this, and few of them talk to MLflow.
if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

_RUN_TAG, _STAGE_TAG = "harmonica.run_id", "harmonica.stage"
_PARENT_TAG = "mlflow.parentRunId"
_MAX_PARAM_LENGTH = 500
_MAX_METRICS_PER_REQUEST = 1000  # MLflow's own limit


def make_client(uri: str) -> "MlflowClient":
    """Return a client of one server for both runs and registry."""
    from mlflow.tracking import MlflowClient

    # A router is three small files; a replica's bar would be shown on the terminal of the endpoint.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    server = signed_in(uri)
    return MlflowClient(server, registry_uri=server)


class Point(NamedTuple):
    """A point has the metrics of one step, and the time when they were measured."""

    step: int
    time_ms: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class StageRun:
    """This handle names one MLflow run; it can be sent to a worker."""

    uri: str
    mlflow_run_id: str

    @property
    def client(self) -> "MlflowClient":
        """Return a client of the run's MLflow."""
        return make_client(self.uri)

    @property
    def shown_uri(self) -> str:
        """Return the tracking URI as messages show it, without secrets."""
        return without_credentials(self.uri)

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log all metrics of one step in one request."""
        self.log_points([Point(step, int(time.time() * 1000), metrics)])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters, nested by section; one that is logged already must be the same."""
        from mlflow.entities import Param

        found = [Param(name, value) for name, value in flatten(params).items()]
        self.client.log_batch(self.mlflow_run_id, params=found)

    def log_points(self, points: Sequence[Point]) -> None:
        """Log the metrics of many steps, in as few requests as MLflow's limits allow.

        Points are sent in order, and the metrics of a step in one request. Points that are sent twice are
        stored once, since MLflow identifies them by step and time.
        """
        from mlflow.entities import Metric

        client = self.client
        batch: list[Metric] = []
        for point in points:
            metrics = [Metric(n, float(v), point.time_ms, point.step) for n, v in point.metrics.items()]
            if len(batch) + len(metrics) > _MAX_METRICS_PER_REQUEST:
                self._log_batch(client, batch)
                batch = []
            batch += metrics
        self._log_batch(client, batch)

    def _log_batch(self, client: "MlflowClient", batch: "list[Metric]") -> None:
        for first in range(0, len(batch), _MAX_METRICS_PER_REQUEST):
            client.log_batch(self.mlflow_run_id, metrics=batch[first : first + _MAX_METRICS_PER_REQUEST])

    def last_step(self, metric: str) -> int:
        """Return the last step that MLflow has of a metric; -1 if it has none."""
        return max((step for step, _ in self.history(metric)), default=-1)

    def history(self, metric: str) -> list[tuple[int, float]]:
        """Return (step, value) of all points that MLflow has of a metric, in order."""
        points = self.client.get_metric_history(self.mlflow_run_id, metric)
        return sorted((point.step, point.value) for point in points)

    def metric_names(self) -> list[str]:
        """Return the names of all metrics that MLflow has of the run."""
        return sorted(self.client.get_run(self.mlflow_run_id).data.metrics)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to MLflow parameters, such as `train.sdt.beta`."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)[:_MAX_PARAM_LENGTH]
    return flat


def _experiment_id(client: "MlflowClient", storage_path: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found.experiment_id
    location = None  # a server decides where artifacts go; beside a local SQLite file they go next to it
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        location = artifacts_of(storage_path).as_uri()
    try:
        return client.create_experiment(EXPERIMENT, artifact_location=location)
    except MlflowException as error:
        found = client.get_experiment_by_name(EXPERIMENT)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
            raise
        return found.experiment_id  # another workflow has made it at the same moment


def _mlflow_run_id(client: "MlflowClient", experiment_id: str, stage: str, run_id: str) -> str:
    """Return MLflow's id of the run of (run id, stage); "" if there is none."""
    query = f"tags.`{_RUN_TAG}` = '{run_id}' and tags.`{_STAGE_TAG}` = '{stage}'"
    found = client.search_runs([experiment_id], query, max_results=1)
    return found[0].info.run_id if found else ""


def find_run(stage: str, run_id: str, storage_path: str) -> StageRun | None:
    """Return the MLflow run of (run id, stage), if there is one."""
    uri = tracking_uri(storage_path)
    client = make_client(uri)
    found = _mlflow_run_id(client, _experiment_id(client, storage_path), stage, run_id)
    return StageRun(uri, found) if found else None


def find_or_create(
    stage: str,
    run_id: str,
    storage_path: str,
    config: Mapping[str, Any],
    parent: StageRun | None = None,
    *,
    generation: int = 1,
) -> StageRun:
    """Return the MLflow run of (run id, stage); make it if there is none.

    Args:
        config: settings, which are logged as the parameters of a new run.
        parent: the run of the workflow, in which that of a stage is nested.
        generation: above 1 for a stage that is done again; its run exists beside the earlier one until it
            replaces that.
    """
    uri = tracking_uri(storage_path)
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        database_of(storage_path).parent.mkdir(parents=True, exist_ok=True)
    client = make_client(uri)
    experiment_id = _experiment_id(client, storage_path)
    label = _label(stage, generation)
    if found := _mlflow_run_id(client, experiment_id, label, run_id):
        client.update_run(found, status="RUNNING")
        return StageRun(uri, found)
    tags = {_RUN_TAG: run_id, _STAGE_TAG: label}
    name = run_id if parent is None else f"{run_id} {stage}"
    if parent is not None:
        tags[_PARENT_TAG] = parent.mlflow_run_id
    run = client.create_run(experiment_id, run_name=name, tags=tags)
    stage_run = StageRun(uri, run.info.run_id)
    stage_run.log_params(config)
    return stage_run


def _label(stage: str, generation: int) -> str:
    return stage if generation == 1 else f"{stage} (again, {generation})"


def _take_its_place(stage: str, run_id: str, storage_path: str, generation: int) -> None:
    """Make the run of a repeated stage the stage's run; the earlier run is kept."""
    client = make_client(tracking_uri(storage_path))
    experiment_id = _experiment_id(client, storage_path)
    if before := _mlflow_run_id(client, experiment_id, stage, run_id):
        client.set_tag(before, _STAGE_TAG, f"{stage} (done again)")
    if now := _mlflow_run_id(client, experiment_id, _label(stage, generation), run_id):
        client.set_tag(now, _STAGE_TAG, stage)


@contextmanager
def stage_run(
    stage: str,
    run_id: str,
    storage_path: str,
    config: Mapping[str, Any],
    parent: StageRun | None = None,
    *,
    generation: int = 1,
) -> Iterator[StageRun]:
    """Yield the stage's run, and close it at the end.

    It is closed as finished, or as failed or killed if the body raises.
    """
    run = find_or_create(stage, run_id, storage_path, config, parent, generation=generation)
    try:
        yield run
    except KeyboardInterrupt:
        run.client.set_terminated(run.mlflow_run_id, "KILLED")
        raise
    except BaseException:
        run.client.set_terminated(run.mlflow_run_id, "FAILED")
        raise
    run.client.set_terminated(run.mlflow_run_id, "FINISHED")
    if generation > 1:
        _take_its_place(stage, run_id, storage_path, generation)


def numbers(report: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a nested report as MLflow metrics.

    Names are such as `arms.cached.psnr_to_full`. An interval makes two metrics:
    `arms.cached.psnr_to_full_interval.low` and `.high`.
    """
    flat: dict[str, float] = {}
    for name, value in report.items():
        if isinstance(value, Mapping):
            flat |= numbers(value, f"{prefix}{name}.")
        elif name.endswith("_interval"):
            flat |= numbers(dict(zip(("low", "high"), value)), f"{prefix}{name}.")
        elif isinstance(value, int | float):
            # MLflow allows no plus in names; "DPM-Solver++" has two.
            flat[(prefix + name).replace("+", "p")] = float(value)
    return flat
