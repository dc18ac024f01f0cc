"""Running again under a run id: what may differ, what is finished, and what `--from` makes undone."""

import json
from typing import Any

from harmonica.changed_settings import changed_settings
from harmonica.text.prompt_files import MANIFEST
from pipelines import tracking
from pipelines.compare_config import free_to_change
from pipelines.config import STAGES, Stage, WorkflowConfig
from pipelines.storage import RunStorage
from pipelines.stream import PROMPTS

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
# None of it changes what the finished stages made; a sweep keeps its own settings.
_FREE = {
    "run_id",
    "stages",
    "serve",
    "sweep",
    "promote",
    "promotion",
    "storage_path",
    "storage_endpoint",
    "preset",
    "done_again_from",
    "node_metrics_interval_s",
}
# How training is placed and watched: after the loss of a node it may have to change.
_FREE_IN_TRAIN = {
    "train.num_workers",
    "train.min_workers",
    "train.resize_interval_s",
    "train.max_failures",
    "train.placement_strategy",
    "train.stall_timeout_s",
    "train.checkpoint_interval_s",
}
# What a stage leaves on the storage, its progress included; first what says that it is finished.
_MADE_BY: dict[Stage, tuple[str, ...]] = {
    "prompts": (f"{PROMPTS}/{MANIFEST}", PROMPTS),
    "train": (f"{ROUTER}/config.json", ROUTER, FAMILY, "train"),
    "evaluate": (REPORT, SHEET, HEAT_MAP),
    "sweep": (SWEEP, "sweep", "sweep.png"),
    "register": (PROMOTION,),
    "serve": (SERVED,),
    "compare": (COMPARISON, COMPARISON_PICTURE, "compare"),
}


def stages_again(config: WorkflowConfig) -> tuple[Stage, ...]:
    """The stages from `--from` on, none where it is not given."""
    first = config.done_again_from
    return STAGES[STAGES.index(first) :] if first else ()


def is_finished(stage: Stage, config: WorkflowConfig, storage: RunStorage) -> bool:
    """Whether what the stage makes is there, and is not to be made again."""
    made = _MADE_BY[stage]
    return bool(made) and stage not in stages_again(config) and storage.exists(made[0])


def take_up(config: WorkflowConfig, storage: RunStorage) -> None:
    """Record the settings of a new run, or hold them against those that it was started with.

    With `--from`, undo that stage and those after it; what is registered stays, and gets a new version.

    Raises:
        ValueError: a setting differs on which a finished stage depends.
    """
    wanted: dict[str, Any] = json.loads(json.dumps(config.to_dict()))  # as JSON has it: tuples are lists
    if not storage.exists(CONFIG):
        storage.write_json(CONFIG, wanted)
        return
    before, again = storage.read_json(CONFIG), stages_again(config)
    free = _FREE.union(again, ("sampler", "seed") if "train" in again else ())
    free |= _FREE_IN_TRAIN | free_to_change(before.get("compare", {}), wanted["compare"])
    if others := changed_settings(before, wanted, free):
        raise ValueError(
            f"{others}: resume run_id {config.run_id} with its own settings, or take a new run id"
        )
    if not again:
        return
    tracking.set_aside(("workflow", *again), config.run_id, config.storage_path)
    for stage in reversed(again):
        for name in _MADE_BY[stage]:
            storage.delete_all(name)
    storage.write_json(CONFIG, wanted)
