"""Timers of a worker's activities, which do not wait for the GPU as it works."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """A stopwatch that sums seconds by name until they are taken."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._is_cuda = torch.device(device).type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time the body; on a GPU, the kernels that it launched."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def take(self) -> dict[str, float]:
        """Return the seconds of each name since the last call; wait for the GPU once."""
        if self._is_cuda and self._spans:
            self._spans[-1][2].synchronize()
        seconds: dict[str, float] = {}
        for name, start, end in self._spans:
            took = start.elapsed_time(end) / 1000 if self._is_cuda else end - start
            seconds[name] = seconds.get(name, 0.0) + took
        self._spans.clear()
        return seconds

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
