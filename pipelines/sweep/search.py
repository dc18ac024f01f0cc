"""Run the trials of a sweep on Ray Tune, side by side."""

import dataclasses
import logging
import os
import time
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from harmonica.cli.common import say
from harmonica.evaluation.metric_table import IDEAL_SPEEDUP, PSNR_TO_FULL

from ..config.workflow import WorkflowConfig
from ..run_state.resume import work_folder
from ..run_state.storage import RunStorage
from .trial import SCORE, TRAJECTORY, Trial, run_trial, trials_of

_SAY_EVERY_S = 20.0
# Ctrl-C ends the workflow, not only the search; its tables and logs go to MLflow.
_TUNE = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class _Progress(tune.Callback):
    """A Ray Tune callback that prints a progress line from time to time."""

    def __init__(self, total: int) -> None:
        self.total, self._ended, self._said = total, 0, 0.0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended += 1
        self._said = 0.0

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if time.monotonic() - self._said < _SAY_EVERY_S:
            return
        self._said = time.monotonic()
        name = Trial(**trial.config["trial"]).name
        near, faster = result[PSNR_TO_FULL], result[IDEAL_SPEEDUP]
        at = f"{name} at trajectory {result[TRAJECTORY]:.0f}: {near:.1f} dB, ideal {faster:.2f}x"
        say(f"[sweep] {self._ended} of {self.total} trials ended, {at}")


def search(config: WorkflowConfig, storage: RunStorage, trials: list[Trial]) -> None:
    """Train every trial, or all but those that the scheduler stops early.

    Raises:
        RuntimeError: a trial failed more often than `train.max_failures`.
    """
    for name, value in _TUNE.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    resources = {"cpu": 1.0, "gpu": float(config.train.use_gpu)}
    trainable = tune.with_resources(tune.with_parameters(run_trial, config=config), resources)
    tuner = tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search([dataclasses.asdict(trial) for trial in trials])},
        tune_config=tune.TuneConfig(
            scheduler=_scheduler(config),
            max_concurrent_trials=config.sweep.max_concurrent,
            reuse_actors=True,  # a process of its own takes longer to start than a short trial
            trial_dirname_creator=lambda trial: f"{Trial(**trial.config['trial']).name}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=storage.uri(work_folder("sweep", storage)),
            failure_config=tune.FailureConfig(max_failures=config.train.max_failures),
            callbacks=[_Progress(len(trials))],
            verbose=0,
        ),
    )
    errors = tuner.fit().errors
    if errors:
        raise RuntimeError(
            f"{len(errors)} of {len(trials)} trials failed more than train.max_failures "
            f"({config.train.max_failures}) times, the first with\n{errors[0]}"
        )


def _scheduler(config: WorkflowConfig) -> TrialScheduler | None:
    if config.sweep.search == "grid":
        return None
    longest = trials_of(config)[0].settings(config).train.all_trajectories
    return ASHAScheduler(
        time_attr=TRAJECTORY,
        metric=SCORE,
        mode="max",
        max_t=longest,
        grace_period=min(config.sweep.report_every, longest),
        reduction_factor=config.sweep.reduction_factor,
    )
