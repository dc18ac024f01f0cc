"""Record a training run on its storage and in MLflow; rank 0 alone does."""

import logging
import time
from typing import Any

from harmonica.evaluation.plots import router_heat_map

from ..tracking.metric_log import MetricLog
from ..tracking.mlflow_runs import StageRun
from .board import Reached
from .checkpoints import Checkpoints
from .jobs import TrainingRun

logger = logging.getLogger(__name__)

UNLOGGED_METRICS = "unlogged_metrics"
"""Key of a checkpoint's metrics that are not in MLflow yet."""
_WORKERS_TAG = "harmonica.workers"
_MLFLOW_PATIENCE_S = 600
# A picture takes a third of a second of a core, as long as many trajectories of a small model.
_PICTURE_EVERY_S = 20.0


class RunRecorder:
    """Write a run's checkpoints to its storage, and its metrics to MLflow.

    Rank 0 alone has one.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        run: TrainingRun,
        stage: StageRun,
        board: Any,
        pending: list[Any],
    ) -> None:
        self.checkpoints, self.run, self.stage, self.board = checkpoints, run, stage, board
        self.log = MetricLog(stage, pending)
        self._since, self._began = run.trajectory, time.monotonic()
        self._announced, self._pictured = "", float("-inf")
        self._announce()

    def say_where(self, nodes: list[str]) -> None:
        """Tag the MLflow run with the workers' nodes, so that a slow one is known."""
        ranks = {node: [str(rank) for rank, one in enumerate(nodes) if one == node] for node in nodes}
        message = "; ".join(f"{node}: {' '.join(on_it)}" for node, on_it in ranks.items())
        try:
            self.stage.client.set_tag(self.stage.mlflow_run_id, _WORKERS_TAG, message)
        except Exception as error:  # any library may raise; a missing tag must not end the run
            logger.warning("the workers' nodes are not in MLflow (%s)", type(error).__name__)

    def add(self, metrics: dict[str, float]) -> None:
        """Add a trajectory's metrics to the log, and tell the driver how far the run is."""
        self.log.add(self.run.trajectory, metrics)
        done, seconds = self.run.trajectory, time.monotonic() - self._began
        progress = self.run.progress
        left = progress.time_left_message(done, self._since, seconds)
        self.board.reach.remote(Reached(progress.message(done), left, metrics["loss"], metrics["cur"]))
        self._announce()

    def _announce(self) -> None:
        """Tell the driver what was measured and decided of it."""
        if self.run.announcement != self._announced:
            self._announced = self.run.announcement
            self.board.announce.remote(self._announced)

    def save(self) -> None:
        """Write a checkpoint and log the metrics that wait.

        The router is plotted now and then, and at the last checkpoint.
        """
        self.checkpoints.save(self.run.trajectory, self.run.state() | {UNLOGGED_METRICS: self.log.state()})
        if self.log.flush() and self._is_picture_due():
            self._log_heat_map()
            self._pictured = time.monotonic()

    def _is_picture_due(self) -> bool:
        is_last = self.run.trajectory == self.run.all_trajectories
        return is_last or time.monotonic() - self._pictured > _PICTURE_EVERY_S

    def _log_heat_map(self) -> None:
        names = [branch.name for branch in self.run.sampler.model.branches]
        plan = self.run.plan
        scores = self.run.router.logits().sigmoid().cpu()
        path = f"router/trajectory_{self.run.trajectory:06d}.png"
        try:
            figure = router_heat_map(scores, plan.to_tensor(), names)
            self.stage.client.log_figure(self.stage.mlflow_run_id, figure, path)
        except Exception as error:  # any library may raise; a missing picture must not end the run
            logger.warning("%s is not in MLflow (%s)", path, type(error).__name__)

    def finish(self) -> None:
        """Log the metrics that still wait; this may take minutes if MLflow is away."""
        self.log.finish(_MLFLOW_PATIENCE_S)
