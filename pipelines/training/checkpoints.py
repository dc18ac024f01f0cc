"""Training states lie in the run's storage, one file each, named by content.

Ray Train keeps its own list of checkpoints in a file that it overwrites in place, so that a kill or a full
disk at the wrong moment loses all of them. Here the folder is the list: a state appears under its final
name once it is whole, and that name has its digest, so that one damaged later is known and passed over.
"""

import hashlib
import io
import logging
from typing import Any

import torch

from ..run_state.resume import work_folder
from ..run_state.storage import RunStorage

logger = logging.getLogger(__name__)

FOLDER = "train/checkpoints"
_KEPT = 3
_DIGITS = 16


class Checkpoints:
    """The states of one run, which hold only tensors and plain values.

    Loading one executes nothing.
    """

    def __init__(self, storage: RunStorage, folder: str = FOLDER) -> None:
        self.storage, self.folder = storage, folder

    @classmethod
    def of_training(cls, storage: RunStorage) -> "Checkpoints":
        """Return the checkpoints of the stage train.

        A stage that is done again has a folder of its own, which is empty at first.
        """
        return cls(storage, f"{work_folder('train', storage)}/checkpoints")

    def save(self, trajectory: int, state: dict[str, Any]) -> None:
        """Write a state, then delete all but the last few.

        Raises:
            OSError: it cannot be written; those before it are as they were.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        name = f"{trajectory:09d}-{_digest(data)}.pt"
        self.storage.write_bytes(f"{self.folder}/{name}", data)
        older = [other for other in self.storage.names(self.folder) if other < name]
        for other in older[: 1 - _KEPT]:
            self.storage.delete(f"{self.folder}/{other}")

    def last(self) -> str:
        """Return the name of the newest state that is whole, "" if there is none.

        A warning names each damaged state that is passed over.
        """
        for name in reversed(self.storage.names(self.folder)):
            size = len(data := self._read(name))
            if _digest(data) == _digest_in(name):
                return name
            logger.warning(
                "checkpoint %s is damaged (%d bytes are not what was written): going on from the one before",
                self.storage.uri(f"{self.folder}/{name}"),
                size,
            )
        return ""

    def load(self, name: str, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Return the state of that name."""
        state: dict[str, Any] = torch.load(
            io.BytesIO(self._read(name)), weights_only=True, map_location=device
        )
        return state

    def _read(self, name: str) -> bytes:
        return self.storage.read_bytes(f"{self.folder}/{name}")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]


def _digest_in(name: str) -> str:
    return name.removesuffix(".pt").rpartition("-")[2]
