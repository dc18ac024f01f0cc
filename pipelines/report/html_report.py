"""Write the report page of a run.

The page is a single HTML file without scripts or external resources.
"""

import base64
import logging
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from harmonica.evaluation.evaluation_report import EvaluationReport

from ..config.workflow import WorkflowConfig
from ..run_state.resume import (
    COMPARISON,
    HEAT_MAP,
    PROMOTION,
    REPORT,
    SERVED,
    SHEET,
    SWEEP,
    current,
)
from ..run_state.storage import RunStorage
from ..tracking import mlflow_runs
from .charts import lambda_curves, png_of, training_curves
from .tables import comparison, not_compared, not_measured, results, sweep

PAGE = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html")
_COMPARISON_PICTURE, _SWEEP_PICTURE = "comparison.png", "sweep.png"
_PICTURES = (SHEET, HEAT_MAP, SERVED, _COMPARISON_PICTURE, _SWEEP_PICTURE)
_LAMBDA = "lambda.step_"
logger = logging.getLogger(__name__)

History = Mapping[str, list[tuple[int, float]]]
"""Points (trajectory, value) of each metric of the training."""


def write_page(
    config: WorkflowConfig, storage: RunStorage, run: mlflow_runs.StageRun, versions: Mapping[str, str]
) -> None:
    """Write the page from the stages' results, into the run's folder and MLflow.

    Args:
        run: the MLflow run of the workflow.
        versions: versions of the libraries and of the code, by name.
    """
    page = render(config, storage, _training_history(config), versions)
    storage.write_bytes(PAGE, page.encode())
    run.client.log_text(run.mlflow_run_id, page, PAGE)


def render(config: WorkflowConfig, storage: RunStorage, history: History, versions: Mapping[str, str]) -> str:
    """Return the page as HTML text."""
    numbers = (REPORT, PROMOTION, COMPARISON, SWEEP)
    there = current((*numbers, *_PICTURES), storage)
    stored, decision, compared, swept = (
        storage.read_json(name) if name in there else None for name in numbers
    )
    report = EvaluationReport.from_json(stored) if stored else None
    pictures = {name: _data_uri(storage.read_bytes(name)) for name in _PICTURES if name in there}
    pictures |= {name: _data_uri(png_of(figure)) for name, figure in _curves(history, config).items()}
    settings, done = config.to_dict(), {"gate": decision is not None, "served": SERVED in pictures}
    done |= {"comparison": compared is not None, "sweep": swept is not None}
    # All inserted text is escaped: prompts and names come from users.
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE.read_text())
    return template.render(
        run_id=config.run_id,
        preset=config.preset,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        report=report,
        results=results(report) if report else None,
        decision=decision,
        comparison=compared,
        comparison_tables=comparison(compared["points"]) if compared else [],
        not_compared=not_compared(compared.get("not_measured", ())) if compared else [],
        sweep=swept,
        sweep_table=sweep(swept["points"]) if swept else None,
        pictures=pictures,
        not_measured=not_measured(settings, report, done),
        settings=sorted(mlflow_runs.flatten(settings).items()),
        versions=[*versions.items(), ("python", platform.python_version())],
    )


def _curves(history: History, config: WorkflowConfig) -> dict[str, Figure]:
    figures = {}
    if history.get("loss") and history.get("cur"):
        figures["curves"] = training_curves(history["loss"], history["cur"], config.train.target_cur)
    lambdas: dict[int, list[float]] = {}
    for name in sorted(history):
        if name.startswith(_LAMBDA):
            for trajectory, value in history[name]:
                lambdas.setdefault(trajectory, []).append(value)
    if lambdas:
        figures["lambda"] = lambda_curves(lambdas)
    return figures


def _training_history(config: WorkflowConfig) -> History:
    """Return the training's metrics from MLflow.

    If they cannot be read, there is a warning and the result is empty.
    """
    try:
        run = mlflow_runs.find_run("train", config.run_id, config.storage_path)
        if run is None:
            return {}
        names = [n for n in run.metric_names() if n in ("loss", "cur") or n.startswith(_LAMBDA)]
        return {name: run.history(name) for name in names}
    except Exception as error:  # of many libraries; a page without curves is better than none
        logger.warning("training's curves are not in the report (%s: %s)", type(error).__name__, error)
        return {}


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
