"""Record a run's progress: its settings, and which stages are done or undone.

`--from` makes stages undone. A stage that is done again works in a folder of its own, and its results replace
the earlier ones once it is done; these stay whole until then, however often it is interrupted. The run's
`config.json` records what is undone, in one write with the settings that it is done again with.

Where stages were refused before they had made anything, other settings of theirs are taken as if `--from`
named the first of them.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from harmonica.data.prompt_files import MANIFEST

from ..config.workflow import STAGES, Stage, WorkflowConfig
from .free_settings import FREE, as_json, differing, free_from
from .storage import RunStorage

ROUTER, FAMILY, REPORT, SHEET, HEAT_MAP, CONFIG = (
    "router",
    "family",
    "report.json",
    "samples.png",
    "router.png",
    "config.json",
)
SERVED, PROMOTION = "served.png", "promotion.json"
COMPARISON, COMPARISON_PICTURE, SWEEP = "comparison.json", "comparison.png", "sweep.json"
WORKFLOW: Literal["workflow"] = "workflow"
"""The name of all stages of a command together, which have an MLflow run of their own."""
_AGAIN = "done_again"
# What a stage makes, first what says that it is finished; prompts make nothing but their folder.
_MADE_BY: dict[Stage, tuple[str, ...]] = {
    "train": (f"{ROUTER}/config.json", ROUTER, FAMILY),
    "evaluate": (REPORT, SHEET, HEAT_MAP),
    "sweep": (SWEEP, "sweep.png"),
    "register": (PROMOTION,),
    "serve": (SERVED,),
    "compare": (COMPARISON, COMPARISON_PICTURE),
}
_HAVE_A_FOLDER: tuple[Stage, ...] = ("prompts", "train", "sweep", "compare")


@dataclass(frozen=True)
class Generation:
    """The number of times that a stage or the workflow was begun.

    It also says whether the last time was finished.
    """

    number: int = 1
    done: bool = True


@dataclass(frozen=True)
class Progress:
    """The stages that `--from` has made undone, and which of them are done by now."""

    first: Stage | None = None
    """The stage that `--from` named last; None if it was never given."""
    stages: dict[str, Generation] = field(default_factory=dict)
    """The generations of the stages that were ever done again."""

    def generation(self, stage: str) -> int:
        """Return the number of the stage's generation; 1 if it is the first."""
        return self.stages.get(stage, Generation()).number

    def is_undone(self, stage: str) -> bool:
        """Return whether the stage has to be done again."""
        return not self.stages.get(stage, Generation()).done

    def folder(self, stage: Stage) -> str:
        """Return the folder with the state that the stage resumes from."""
        number = self.generation(stage)
        return stage if number == 1 else f"{stage}-{number}"

    def older_folders(self, stage: Stage) -> list[str]:
        """Return the folders of the stage's earlier generations."""
        numbers = range(1, self.generation(stage))
        return [Progress(stages={stage: Generation(number)}).folder(stage) for number in numbers]


def stages_again(config: WorkflowConfig) -> tuple[Stage, ...]:
    """Return the stages from `--from` on; none if it is not given."""
    first = config.done_again_from
    return STAGES[STAGES.index(first) :] if first else ()


def recorded(storage: RunStorage) -> Progress:
    """Return the progress that the run's `config.json` records."""
    return _progress_in(_settings(storage))


def _settings(storage: RunStorage) -> dict[str, Any]:
    return storage.read_json(CONFIG) if storage.exists(CONFIG) else {}


def _progress_in(settings: dict[str, Any]) -> Progress:
    about = settings.get(_AGAIN)
    if about is None:
        return Progress()
    return Progress(about["from"], {name: Generation(**one) for name, one in about["stages"].items()})


def progress_of(config: WorkflowConfig, storage: RunStorage) -> Progress:
    """Return the recorded progress with what `--from` makes undone.

    Nothing is changed. The same command, repeated before it has finished, resumes what it has made undone.
    """
    config, settings = _with_implied_from(config, storage), _settings(storage)
    progress, again = _progress_in(settings), stages_again(config)
    is_begun = progress.first == config.done_again_from and progress.is_undone(WORKFLOW)
    theirs = FREE.difference(set(_HAVE_A_FOLDER).intersection(again))
    if not again or (is_begun and not differing(config, settings, theirs)):
        return progress
    number = 1 + max((one.number for one in progress.stages.values()), default=1)
    undone = dict.fromkeys((WORKFLOW, *again), Generation(number, done=False))
    return Progress(config.done_again_from, progress.stages | undone)


def is_finished(stage: Stage, config: WorkflowConfig, storage: RunStorage) -> bool:
    """Return whether the stage's results are there and it is not to be done again."""
    progress = progress_of(config, storage)
    made = f"{progress.folder(stage)}/{MANIFEST}" if stage == "prompts" else _MADE_BY[stage][0]
    return not progress.is_undone(stage) and storage.exists(made)


def current(names: Iterable[str], storage: RunStorage) -> list[str]:
    """Return the results that are there and whose stages are not to be done again."""
    progress = recorded(storage)
    undone = {name for stage, made in _MADE_BY.items() if progress.is_undone(stage) for name in made}
    return [name for name in names if name not in undone and storage.exists(name)]


def is_current(name: str, storage: RunStorage) -> bool:
    """Return whether a result is there and its stage is not to be done again."""
    return bool(current([name], storage))


def work_folder(stage: Stage, storage: RunStorage) -> str:
    """Return the folder that a stage resumes from, such as `train`.

    It is `train-2` if the stage is done again.
    """
    return recorded(storage).folder(stage)


def check(config: WorkflowConfig, storage: RunStorage) -> None:
    """Compare the settings with those that the run was started with, if it was.

    Nothing is changed.

    Raises:
        ValueError: a setting differs on which a finished stage depends.
    """
    before = _settings(storage)
    first = _with_implied_from(config, storage).done_again_from
    if not before or (not config.done_again_from and first and _first_unbegun(storage) == STAGES[0]):
        return  # whatever was given, nothing has been made of it
    if others := differing(config, before, free_from(first)):
        again = [stage for stage in STAGES if stage in config.stages]
        cures = [stage for stage in again if not differing(config, before, free_from(stage))]
        cure = f"give --from {cures[-1]} to do that stage and those after it again, " if cures else ""
        raise ValueError(
            f"{others}: resume run_id {config.run_id} with its own settings, {cure}or take a new run id"
        )


def _first_unbegun(storage: RunStorage) -> Stage | None:
    """Return the first stage from which on none has a result or a checkpoint.

    It is None if the last one has.
    """
    progress, first = recorded(storage), None
    for stage in reversed(STAGES):
        folder = progress.folder(stage) + ("/checkpoints" if stage == "train" else "")
        made = _MADE_BY[stage][0] if stage != "prompts" else f"{folder}/{MANIFEST}"
        if storage.exists(made) or (stage in _HAVE_A_FOLDER and storage.names(folder, below=True)):
            break
        first = stage
    return first


def _with_implied_from(config: WorkflowConfig, storage: RunStorage) -> WorkflowConfig:
    """Return the settings with `--from` the first stage that has made nothing.

    They are returned as they are where they are those of the run, or no such stage is asked for.
    """
    before = _settings(storage)
    if config.done_again_from or not before or not differing(config, before, FREE):
        return config
    first = _first_unbegun(storage)
    left = STAGES[STAGES.index(first) :] if first else ()
    implied = next((stage for stage in left if stage in config.stages), None)
    return dataclasses.replace(config, done_again_from=implied)


def begin(config: WorkflowConfig, storage: RunStorage) -> WorkflowConfig:
    """Record the settings of a new run, or what `--from` makes undone.

    This happens before the first stage.

    Returns:
        The settings without `--from`, which must not apply twice.

    Raises:
        ValueError: a setting differs, as in `check`.
    """
    check(config, storage)
    progress, before = progress_of(config, storage), _settings(storage)
    if not before:
        storage.write_json(CONFIG, as_json(config))
    elif progress != _progress_in(before):
        stages = {name: dataclasses.asdict(one) for name, one in progress.stages.items()}
        about = {_AGAIN: {"from": progress.first, "stages": stages}}
        storage.write_json(CONFIG, as_json(config) | about)
    return dataclasses.replace(config, done_again_from=None)


def mark_done(stage: Stage | Literal["workflow"], storage: RunStorage) -> None:
    """Record that a stage is done, and delete the folders of its earlier generations."""
    settings = _settings(storage)
    progress = _progress_in(settings)
    if not progress.is_undone(stage):
        return
    if stage in _HAVE_A_FOLDER:
        for folder in progress.older_folders(stage):
            storage.delete_all(folder)
    settings[_AGAIN]["stages"][stage]["done"] = True
    storage.write_json(CONFIG, settings)
