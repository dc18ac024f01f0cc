"""End a workflow: write its report page, and say on the terminal how it went."""

import importlib.metadata
import logging
import os
import shutil
import subprocess
import time
from pathlib import Path

from harmonica.cli.common import say
from harmonica.evaluation.evaluation_report import EvaluationReport
from harmonica.version import __version__

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
from ..runtime.ray_runtime import is_private
from ..tracking import mlflow_runs
from .html_report import PAGE, write_page
from .terminal import results_table

logger = logging.getLogger(__name__)


def git_revision(file: Path = Path(__file__)) -> str:
    """Return the git revision that a file of this package is from.

    It ends with `-dirty` where tracked files differ from it. It is "unknown" where the file is in no clone,
    as in a job's unpacked folder or an installed package, and on a machine without git.
    """
    if shutil.which("git") is None or not _git(file, "ls-files", "--error-unmatch", file.name):
        return "unknown"
    revision = _git(file, "rev-parse", "--verify", "HEAD") or "unknown"
    is_dirty = _git(file, "status", "--porcelain", "--untracked-files=no")
    return f"{revision}-dirty" if is_dirty else revision


def _git(file: Path, *arguments: str) -> str:
    """Return what git says in the file's folder; "" where it fails."""
    # Those of a hook name another repository.
    others = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(file.parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=others)
    return "" if done.returncode else done.stdout.strip()


def versions() -> dict[str, str]:
    """Return the versions of this project and of libraries that results depend on."""
    libraries = ("ray", "torch", "mlflow", "timm", "diffusers")
    return {"harmonica-ray": __version__} | {name: importlib.metadata.version(name) for name in libraries}


def summarise(config: WorkflowConfig, storage: RunStorage, run: mlflow_runs.StageRun, url: str) -> None:
    """Write the run's page, and say on the terminal how the run went.

    Args:
        run: the MLflow run of the whole workflow.
        url: URL of the endpoint; "" if none was started.
    """
    try:
        write_page(config, storage, run, versions() | {"git revision": git_revision()})
    except Exception as error:  # of many libraries; the run has its results without it
        logger.warning("%s is not complete (%s: %s)", PAGE, type(error).__name__, error)
    there = current((PAGE, REPORT, COMPARISON, SWEEP, PROMOTION, SHEET, HEAT_MAP, SERVED), storage)
    if REPORT in there:
        report = EvaluationReport.from_json(storage.read_json(REPORT))
        results_table(report)
        say(report.verdict or "")
    say(f"results:  {storage.uri()}")
    for name in there:
        say(f"          {Path(storage.uri(name)) if storage.is_local else name}")
    say("MLflow:   make ui      (http://127.0.0.1:5000)")
    if config.serve.keep and url:
        say(f"endpoint: {url} stays up")
        _wait()
    else:
        say("endpoint: make serve   (http://127.0.0.1:8000, serves the champion)")


def _wait() -> None:
    """Wait until interrupted if the cluster is private.

    Its endpoint lives as long as this process.
    """
    if is_private():
        say("          until Ctrl-C")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            say("stopped")
