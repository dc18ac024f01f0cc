"""Store a comparison's results in one file for each variant.

An interruption then loses one variant's result at most.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from ..config.compare import CompareConfig
from ..config.workflow import WorkflowConfig
from ..run_state.resume import COMPARISON, CONFIG
from ..run_state.storage import RunStorage


class Results:
    """The stored results of one run.

    Those that were measured on another number of images are ignored.
    """

    def __init__(self, storage: RunStorage, folder: str, samples: int) -> None:
        self.storage, self.folder, self.samples = storage, folder, samples

    def get(self, name: str) -> Any:
        """Return the stored result of a variant, None if there is none."""
        path = self._path(name)
        kept = self.storage.read_json(path) if self.storage.exists(path) else {}
        return kept["result"] if kept.get("samples") == self.samples else None

    def put(self, name: str, result: Mapping[str, Any]) -> None:
        """Store the result of a variant."""
        self.storage.write_json(self._path(name), {"samples": self.samples, "result": result})

    def _path(self, name: str) -> str:
        return f"{self.folder}/measured/{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.json"


def compared(settings: CompareConfig) -> Any:
    """Return the settings of a comparison as they are read back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def is_complete(config: WorkflowConfig, storage: RunStorage) -> bool:
    """Return whether `comparison.json` has every variant that the settings ask for.

    A comparison that lacks variants, or in which some failed, is continued; measured results are reused.
    """
    if not storage.exists(COMPARISON):
        return False
    made = storage.read_json(COMPARISON)
    of = made.get("compared") or storage.read_json(CONFIG)["compare"]  # versions before this kept no record
    return bool(of == compared(config.compare)) and not made.get("not_measured")


def record(config: WorkflowConfig, storage: RunStorage) -> None:
    """Write the comparison's settings into those of the run.

    The next resume compares its own settings with them.
    """
    settings = storage.read_json(CONFIG)
    if settings["compare"] != (now := compared(config.compare)):
        storage.write_json(CONFIG, settings | {"compare": now})
