"""Keep what each training worker says that it does.

This is a module of its own, since an actor imports the module of its class: beside the code that watches and
prints, it would import the commands' parser and pydantic for it.
"""

import time
from typing import NamedTuple


class Reached(NamedTuple):
    """The progress of training, as its first worker sees it."""

    phase: str
    """The present phase and how much of it is done."""
    time_left: str
    """The time left, and what follows."""
    loss: float
    cur: float


class Board:
    """An actor beside the driver, which workers tell what they begin.

    They do not wait for it.
    """

    def __init__(self) -> None:
        self._said: dict[int, tuple[str, float]] = {}
        self._reached: Reached | None = None
        self._stopped: Exception | None = None
        self._announced = ""

    def tell(self, rank: int, doing: str) -> None:
        self._said[rank] = (doing, time.monotonic())

    def reach(self, reached: Reached) -> None:
        self._reached = reached

    def announce(self, line: str) -> None:
        """Have the driver print a line, once."""
        self._announced = line

    def stop(self, error: Exception) -> None:
        """End training here, since going on or trying again would not help."""
        self._stopped = error

    def why_stopped(self) -> Exception | None:
        return self._stopped

    def read(self) -> tuple[dict[int, tuple[str, float]], Reached | None, str]:
        """Return each rank's work and its age, the progress and an announcement."""
        now = time.monotonic()
        said = {rank: (doing, now - since) for rank, (doing, since) in sorted(self._said.items())}
        return said, self._reached, self._announced
