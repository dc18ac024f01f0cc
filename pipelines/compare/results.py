"""What a comparison has measured so far: a file an arm, written as it is done, so a kill costs one arm."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from pipelines.config.compare import CompareConfig
from pipelines.config.workflow import WorkflowConfig
from pipelines.run_state.resume import COMPARISON, CONFIG
from pipelines.run_state.storage import RunStorage


class Results:
    """The arms of one run; those that were measured on another number of images are not there."""

    def __init__(self, storage: RunStorage, folder: str, samples: int) -> None:
        self.storage, self.folder, self.samples = storage, folder, samples

    def get(self, name: str) -> Any:
        """What is kept of an arm, None where there is nothing."""
        path = self._path(name)
        kept = self.storage.read_json(path) if self.storage.exists(path) else {}
        return kept["result"] if kept.get("samples") == self.samples else None

    def put(self, name: str, result: Mapping[str, Any]) -> None:
        self.storage.write_json(self._path(name), {"samples": self.samples, "result": result})

    def _path(self, name: str) -> str:
        return f"{self.folder}/measured/{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.json"


def compared(settings: CompareConfig) -> Any:
    """What a comparison is of, as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def is_complete(config: WorkflowConfig, storage: RunStorage) -> bool:
    """Whether `comparison.json` has every arm that the settings ask for now.

    One that lacks arms, or has some that failed, is gone on with; what is measured stays.
    """
    if not storage.exists(COMPARISON):
        return False
    made = storage.read_json(COMPARISON)
    of = made.get("compared") or storage.read_json(CONFIG)["compare"]  # versions before this kept no record
    return bool(of == compared(config.compare)) and not made.get("not_measured")


def record(config: WorkflowConfig, storage: RunStorage) -> None:
    """Keep what is compared now in the run's settings, which the next resume is held against."""
    settings = storage.read_json(CONFIG)
    if settings["compare"] != (now := compared(config.compare)):
        storage.write_json(CONFIG, settings | {"compare": now})
