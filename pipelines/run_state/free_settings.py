"""Say which settings of a run may differ when it is resumed, and which do."""

import json
from typing import Any

from harmonica.validation.changed_settings import changed_settings

from ..config.compare import free_to_change
from ..config.workflow import STAGES, Stage, WorkflowConfig

# None of it changes what the finished stages made; a sweep keeps its own settings.
FREE = {
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
    # How the model is run, which moves values by roundings.
    "model.compile",
    "model.execution",
    "model.graph_memory",
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


def free_from(first: Stage | None) -> set[str]:
    """Return what may differ where the stages from this one on are done again.

    It is `FREE` where none is.
    """
    again = STAGES[STAGES.index(first) :] if first else ()
    return FREE.union(again, ("sampler", "seed") if "train" in again else ())


def as_json(config: WorkflowConfig) -> dict[str, Any]:
    """Return the settings as they are read back from `config.json`."""
    found: dict[str, Any] = json.loads(json.dumps(config.to_dict()))  # tuples are lists
    return found


def differing(config: WorkflowConfig, before: dict[str, Any], free: set[str]) -> str:
    """Return in words the settings that differ from those before."""
    now = as_json(config)
    free = free | _FREE_IN_TRAIN | free_to_change(before.get("compare", {}), now["compare"])
    return changed_settings(before, now, free, as_json(WorkflowConfig()))
