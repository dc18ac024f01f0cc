"""Read the timesteps of a pipeline's calls without waiting for the device.

Reading a tensor back waits until the device has done all that was queued before. A pipeline's call
therefore waits twice at most: for its first timestep or all of its scheduler's, and at its end.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from harmonica.integrations.call_owner import current_pipeline


class TimestepReader:
    """Reads timesteps from the host, or remembers those to compare later."""

    def __init__(self) -> None:
        self._schedule: tuple[Tensor, int | None, list[float]] | None = None
        self.forget()

    def forget(self) -> None:
        """Drop the scheduler's timesteps and what is to be compared."""
        self._schedule = None
        self.postponed: list[tuple[float, Tensor]] = []
        """The timestep that a call should have, and the one that it has (N,), on the device."""

    def read(self, timestep_N: Tensor, expect: Callable[[], float | None]) -> float:
        """Return the timestep of a call.

        Args:
            expect: says what it should be, if that is known. It is then taken for it where the host does not
                have it, and is to be compared at the end of the pipeline's call.

        Raises:
            ValueError: rows have different timesteps.
        """
        known = self._known(timestep_N)
        if known is not None:
            return known
        if (expected := expect()) is not None:
            self.postponed.append((expected, timestep_N))
            return expected
        return one_value(timestep_N.tolist())

    def _known(self, timestep_N: Tensor) -> float | None:
        """Return the timestep where it can be had without the device.

        diffusers' pipelines pass views of their scheduler's timesteps, which are read once a call.
        """
        if on_host(timestep_N):
            return one_value(timestep_N.tolist())
        scheduler: Any = getattr(current_pipeline(), "scheduler", None)
        timesteps_T = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps_T, Tensor) or not _is_entry(timestep_N, timesteps_T):
            return None
        version = None if timesteps_T.is_inference() else timesteps_T._version
        if self._schedule is None or self._schedule[0] is not timesteps_T or self._schedule[1] != version:
            self._schedule = timesteps_T, version, timesteps_T.tolist()
        place = timestep_N.storage_offset() - timesteps_T.storage_offset()
        return float(self._schedule[2][place])


def on_host(tensor: Tensor) -> bool:
    """Return whether a tensor's values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def _is_entry(timestep_N: Tensor, timesteps_T: Tensor) -> bool:
    """Return whether all rows are one entry of a scheduler's own timesteps (T,)."""
    place = timestep_N.storage_offset() - timesteps_T.storage_offset()
    return (
        timestep_N.untyped_storage()._cdata == timesteps_T.untyped_storage()._cdata
        and timestep_N.dtype == timesteps_T.dtype
        and (len(timestep_N) == 1 or timestep_N.stride(0) == 0)
        and timesteps_T.stride(0) == 1
        and 0 <= place < len(timesteps_T)
    )


def one_value(timesteps: Sequence[float]) -> float:
    """Return the timestep that all rows have.

    Raises:
        ValueError: they differ.
    """
    values = set(timesteps)
    if len(values) != 1:
        raise ValueError(f"timestep is {sorted(values)}: a plan has one step for the whole batch")
    return values.pop()


def read_all(timesteps: Sequence[Tensor]) -> list[float]:
    """Return the timestep of each of some calls (N,); waits for the device once.

    Raises:
        ValueError: rows of a call have different timesteps.
    """
    return [one_value(row) for row in torch.stack(list(timesteps)).tolist()] if timesteps else []
