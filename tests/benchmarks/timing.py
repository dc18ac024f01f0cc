"""Arms warmed up, run in turn, and compared by their medians."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

_LONG_S = 10.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall time of one arm."""

    median_s: float
    spread_s: float
    """Slowest minus fastest round."""


@dataclass(frozen=True, slots=True)
class Aim:
    """What a value should be."""

    direction: Literal["<=", ">="]
    bound: float

    def holds(self, value: float) -> bool:
        return value <= self.bound if self.direction == "<=" else value >= self.bound

    def __str__(self) -> str:
        return f"{self.direction} {self.bound:.2f}"


def cpu_name() -> str:
    """As Linux reports it; elsewhere the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe_machine() -> dict[str, str | int | float]:
    """Where, and beside how much other work, the numbers were taken."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "gpu": gpu,
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 0,
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One comparison, as bench.json has it."""

    what: str
    arms: dict[str, Timing]
    value: float
    unit: str
    aim: str
    holds: bool
    machine: dict[str, str | int | float] = field(default_factory=describe_machine)

    @classmethod
    def judge(cls, what: str, arms: dict[str, Timing], value: float, unit: str, aim: Aim) -> "Row":
        """A row whose value is held against its aim."""
        return cls(what=what, arms=arms, value=value, unit=unit, aim=str(aim), holds=aim.holds(value))


def seconds_of(arm: Callable[[], object]) -> float:
    """Of one call; where there is a GPU by its events, once all that was queued is done."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        arm()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    arm()
    done.record()
    torch.cuda.synchronize()
    return begun.elapsed_time(done) / 1000


def time_arms(arms: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, Timing]:
    """Each arm once for warmth, then all of them in turn, so that a slow minute hits them alike.

    After a warm-up of over ten seconds the rest go without: what they share is warm, and the start of so long
    an arm is nothing beside it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        if seconds_of(arm) > _LONG_S and not torch.cuda.is_available():  # there it is compiling
            break
    for _ in range(rounds):
        for name, arm in arms.items():
            seconds[name].append(seconds_of(arm))
    return {
        name: Timing(statistics.median(values), max(values) - min(values)) for name, values in seconds.items()
    }
