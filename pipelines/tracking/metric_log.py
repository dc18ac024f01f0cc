"""Send training metrics to MLflow, each of them exactly once.

Metrics that MLflow has not confirmed go into the next checkpoint, so they outlive the worker. Points that it
has are not sent again, even if the confirmation was lost or the trajectory was trained again.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

from .mlflow_runs import Point, StageRun

logger = logging.getLogger(__name__)

_LAST = "loss"
"""The metric that every trajectory has and that is sent last: if MLflow has it, it has the others too."""
_RETRY_S = 2.0
# Codes of MLflow's errors that pass by themselves; its client makes an INTERNAL_ERROR of no answer.
_PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")


class MetricLog:
    """The log holds the metrics of rank 0 that MLflow has not confirmed yet."""

    def __init__(self, run: StageRun, pending: list[Any] | None = None) -> None:
        """Start with what an earlier log had pending.

        Args:
            pending: `state` of the log that this one goes on from.
        """
        self.run = run
        self._pending: list[Point] = [Point(*point) for point in pending or []]
        self._known_step: int | None = None

    def add(self, trajectory: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of one trajectory."""
        others = {name: value for name, value in metrics.items() if name != _LAST}
        last = {_LAST: metrics[_LAST]}
        self._pending.append(Point(trajectory, int(time.time() * 1000), others | last))

    def state(self) -> list[Any]:
        """Return the state for a checkpoint, as plain values."""
        return [list(point) for point in self._pending]

    def flush(self) -> bool:
        """Send what is pending; return False, with a warning, if MLflow does not answer."""
        import requests  # not at the top, as nothing of MLflow is
        from mlflow.exceptions import MlflowException

        try:
            if self._known_step is None:
                self._known_step = self.run.last_step(_LAST)
            new = [point for point in self._pending if point.step > self._known_step]
            self.run.log_points(new)
        except (MlflowException, requests.RequestException) as error:
            if isinstance(error, MlflowException) and error.error_code not in _PASSING:
                raise
            logger.warning(
                "MLflow at %s does not take metrics (%s): %d trajectories wait in the checkpoint",
                self.run.shown_uri,
                type(error).__name__,
                len(self._pending),
            )
            return False
        self._pending.clear()
        return True

    def finish(self, patience_s: float) -> None:
        """Send what is pending, with retries.

        Raises:
            TimeoutError: MLflow did not answer; the metrics are in the last checkpoint.
        """
        deadline = time.monotonic() + patience_s
        while not self.flush():
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"MLflow at {self.run.shown_uri} has not answered for {patience_s:.0f} s and lacks "
                    f"{len(self._pending)} trajectories' metrics: start it and run again with the same run id"
                )
            time.sleep(_RETRY_S)
