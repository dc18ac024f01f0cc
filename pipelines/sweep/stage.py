"""Train many settings on Ray Tune, evaluate them, register the Pareto front.

They are all combinations of targets, lambda kinds and seeds.

Trials train side by side; they are measured after one another, so that none slows down another's times.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from harmonica.cli.common import say
from harmonica.evaluation.evaluation_report import EvaluationReport
from harmonica.evaluation.metric_table import (
    CUR,
    IDEAL_SPEEDUP,
    NUM_INFERENCE_STEPS,
    PSNR_TO_FULL,
    REALISED_SHARE,
    SPEEDUP,
)
from harmonica.validation.changed_settings import changed_settings

from ..config.workflow import WorkflowConfig
from ..evaluation.stage import evaluate
from ..promotion.gate import score
from ..promotion.publishing import register_beside
from ..report.charts import png_of
from ..run_state.resume import ROUTER, SWEEP, progress_of, work_folder
from ..run_state.routers import load_router
from ..run_state.storage import RunStorage
from ..runtime.ray_runtime import plainly
from ..tracking import mlflow_runs
from .pareto import front_figure, on_front
from .search import search
from .trial import SCORE, TRAJECTORY, Trial, evaluation_seed, place, reports_of, trials_of

PICTURE = "sweep.png"
_SETTINGS = "settings.json"


def check_sweep(config: WorkflowConfig, storage: RunStorage) -> None:
    """Check the settings before any work starts.

    Raises:
        ValueError: a trial's settings are invalid, or the run's sweep was started with others.
    """
    for trial in trials_of(config):
        trial.settings(config)
    begun = f"{progress_of(config, storage).folder('sweep')}/{_SETTINGS}"
    if not storage.exists(begun):
        return
    if others := changed_settings({"sweep": storage.read_json(begun)}, {"sweep": _settings(config)}):
        raise ValueError(
            f"{others}: go on with the sweep of run_id {config.run_id} as it was begun, or give --from sweep "
            "to do it again"
        )


@plainly()
def sweep(config: WorkflowConfig, storage: RunStorage, run: mlflow_runs.StageRun) -> dict[str, Any]:
    """Train, evaluate and register; return the contents of `sweep.json`.

    A sweep that was interrupted resumes: trials from their last report, evaluation at the first missing one.

    Args:
        run: the MLflow run of the stage.

    Raises:
        RuntimeError: a trial failed more often than train.max_failures.
    """
    trials = trials_of(config)
    settings = f"{work_folder('sweep', storage)}/{_SETTINGS}"
    if not storage.exists(settings):
        storage.write_json(settings, _settings(config))
    if not all(_is_trained(storage, trial) for trial in trials):
        search(config, storage, trials)
    whole = [trial for trial in trials if _is_trained(storage, trial)]
    points = [_measured(config, storage, trial, run) for trial in whole]
    places = [(point[SPEEDUP], point[PSNR_TO_FULL]) for point in points]
    for trial, point, best in zip(whole, points, on_front(places)):
        point["on_front"] = best
        point["version"] = _register(config, storage, trial, point, run) if best else ""
    stopped = [
        {"name": trial.name} | (reports_of(storage, trial) or [{}])[-1]
        for trial in trials
        if trial not in whole
    ]
    result: dict[str, Any] = {
        "verdict": _sweep_summary(points, stopped),
        "points": points,
        "stopped": stopped,
    }
    figure = front_figure(places, [point["name"] for point in points])
    storage.write_bytes(PICTURE, png_of(figure))
    _log(run, result, figure)
    storage.write_json(SWEEP, result)
    return result


def _settings(config: WorkflowConfig) -> dict[str, Any]:
    """Return the settings that results depend on.

    How many trials run at once does not matter.
    """
    found: dict[str, Any] = config.to_dict()["sweep"] | {"targets": config.sweep.all_targets}
    names = {name: value for name, value in found.items() if name != "max_concurrent"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in names.items()}


def _is_trained(storage: RunStorage, trial: Trial) -> bool:
    return storage.exists(f"{place(storage, trial)}/{ROUTER}/config.json")


def _measured(
    config: WorkflowConfig, storage: RunStorage, trial: Trial, run: mlflow_runs.StageRun
) -> dict[str, Any]:
    """Return a trial's evaluation as a point, reading it if it was made before."""
    folder = place(storage, trial)
    path = f"{folder}/report.json"
    if storage.exists(path):
        report = EvaluationReport.from_json(storage.read_json(path))
    else:
        artifact = load_router(storage, f"{folder}/{ROUTER}")
        settings = dataclasses.replace(
            config,
            seed=evaluation_seed(config),
            evaluate=dataclasses.replace(
                config.evaluate, transfer=(), transfer_guidance=(), transfer_steps=(), noise_floor=False
            ),
        )
        report, _ = evaluate(settings, artifact)
        with _tracked(config, trial, run) as ours:
            last = ours.last_step(SCORE)
            for reported in reports_of(storage, trial):
                if reported[TRAJECTORY] > last:
                    ours.log(reported, step=int(reported[TRAJECTORY]))
            ours.log(mlflow_runs.numbers(report.to_json()))
        storage.write_json(path, report.to_json())
        say(f"[sweep] {trial.name}: {report.verdict}")
    return _point(trial, report, config.promotion.db_per_doubling)


def _point(trial: Trial, report: EvaluationReport, db_per_doubling: float) -> dict[str, Any]:
    """Return a trial's settings and its router's numbers, JSON-ready."""
    speeds, cached = report.speeds, report.cached
    point = {
        "name": trial.name,
        **dataclasses.asdict(trial),
        CUR: speeds.cur,
        IDEAL_SPEEDUP: speeds.ideal_speedup,
        REALISED_SHARE: speeds.realised_share,
        "samples": report.samples,
        "worth_having": report.worth_having,
    }
    point |= {key: value for key, value in cached.to_json().items() if key != NUM_INFERENCE_STEPS}
    worth = score(cached.psnr_to_full, speeds.measured_speedup, db_per_doubling)
    return point | {SPEEDUP: speeds.measured_speedup, SCORE: worth}


def _tracked(config: WorkflowConfig, trial: Trial, run: mlflow_runs.StageRun) -> Any:
    """Open a trial's MLflow run, nested in the run of the sweep.

    A repeated sweep has new ones.
    """
    stage = f"sweep {trial.name} of {run.mlflow_run_id[:8]}"
    return mlflow_runs.stage_run(stage, config.run_id, config.storage_path, dataclasses.asdict(trial), run)


def _register(
    config: WorkflowConfig,
    storage: RunStorage,
    trial: Trial,
    point: Mapping[str, Any],
    run: mlflow_runs.StageRun,
) -> str:
    folder = place(storage, trial)
    tags = {"sweep": trial.name, "score": f"{point[SCORE]:.6g}"}
    with _tracked(config, trial, run) as ours:
        report = EvaluationReport.from_json(storage.read_json(f"{folder}/report.json"))
        return register_beside(config, storage, f"{folder}/{ROUTER}", report, ours, tags)


def _sweep_summary(points: list[dict[str, Any]], stopped: list[dict[str, Any]]) -> str:
    front = sorted((p for p in points if p["on_front"]), key=lambda point: point[SPEEDUP])
    ends = [f"{p[PSNR_TO_FULL]:.1f} dB at {p[SPEEDUP]:.2f}x" for p in (front[0], front[-1])]
    message = (
        f"{len(front)} of {len(points)} trained routers on the front: {' to '.join(dict.fromkeys(ends))}"
    )
    best = max(front, key=lambda point: point[SCORE])
    early = f"; trials stopped early: {len(stopped)}" if stopped else ""
    return f"{message}; the best score, {best[SCORE]:.1f}, is that of {best['name']}{early}."


def _log(run: mlflow_runs.StageRun, result: dict[str, Any], figure: Figure) -> None:
    columns = sorted({key for point in result["points"] for key in point})
    table = {key: [str(point.get(key, "")) for point in result["points"]] for key in columns}
    run.client.log_figure(run.mlflow_run_id, figure, PICTURE)
    run.client.log_table(run.mlflow_run_id, table, "sweep_table.json")
    run.client.log_dict(run.mlflow_run_id, result, SWEEP)
