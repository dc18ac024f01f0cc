"""The plan: which branch is computed at which step, the same for all images."""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from harmonica.models.base import Macs

Forecast = tuple[tuple[tuple[float, ...], ...], ...]
"""T x B weights of the differences between a branch's last values, newest first."""
Correction = tuple[tuple[float, ...], ...]
"""T x J weights of the differences between the model's own last outputs, newest first."""


def forecast_of(weights_TBK: Tensor) -> Forecast:
    """Convert a table of weights to a plan's form."""
    return tuple(tuple(tuple(entry) for entry in row) for row in weights_TBK.tolist())


def correction_of(weights_TJ: Tensor) -> Correction:
    """Convert a table of weights to a plan's form."""
    return tuple(tuple(row) for row in weights_TJ.tolist())


@dataclass(frozen=True)
class Plan:
    """T x B booleans; row T-1, which runs first, always computes."""

    compute: tuple[tuple[bool, ...], ...]
    """Row i is step i; True computes the branch and refreshes its cache, False reuses it."""
    forecast: Forecast | None = field(default=None, repr=False)
    """Learned weights of forecasts (`harmonica.training.plans.forecast_fit`).

    None where they are linear, or values are held."""
    correction: Correction | None = field(default=None, repr=False)
    """Weights that correct the model's output at every step (`harmonica.core.correction`).

    None where outputs stay as they are."""
    segments: tuple[int, ...] | None = field(default=None, repr=False)
    """The first branch of each segment: neighbours that are reused and forecast as one, with the same weights
    (`harmonica.core.segments`).

    None where branches are forecast one by one."""

    def __post_init__(self) -> None:
        if not self.compute or len({len(row) for row in self.compute}) != 1:
            raise ValueError("plan rows differ in length: give T rows of one entry a branch")
        if not all(self.compute[-1]):
            raise ValueError("plan row T-1 reuses a branch: it runs first and has nothing to reuse")
        if self.forecast is not None and [len(row) for row in self.forecast] != [
            len(r) for r in self.compute
        ]:
            raise ValueError("the forecast has another shape than the plan: give weights for T x B entries")
        if self.correction is not None and (
            len(self.correction) != len(self.compute) or len({len(row) for row in self.correction}) != 1
        ):
            raise ValueError("the correction has another shape than the plan: give T rows of as many weights")
        if self.segments is not None:
            self._check_segments(self.segments)

    def _check_segments(self, segments: tuple[int, ...]) -> None:
        if segments[:1] != (0,) or any(not a < b < self.num_branches for a, b in pairwise(segments)):
            raise ValueError(
                f"the plan's segments begin at {segments}: give numbers of branches from 0, ascending"
            )
        for rows in (self.compute, self.forecast or ()):
            if any(len({*row[each.start : each.stop]}) > 1 for row in rows for each in self.segment_ranges):
                raise ValueError("branches of one of the plan's segments differ: give each the same entries")

    @property
    def segment_ranges(self) -> list[range]:
        """Return the branches of each segment.

        Where there are none, each branch is one by itself.
        """
        ends = (*range(self.num_branches), self.num_branches)
        if self.segments is not None:
            ends = (*self.segments, self.num_branches)
        return [range(first, end) for first, end in pairwise(ends)]

    def by_segment(self) -> "Plan":
        """Return the plan with a column a segment in place of one a branch."""
        if self.segments is None:
            return self
        firsts = self.segments
        compute = tuple(tuple(row[first] for first in firsts) for row in self.compute)
        if self.forecast is None:
            return Plan(compute, None, self.correction)
        forecast = tuple(tuple(row[first] for first in firsts) for row in self.forecast)
        return Plan(compute, forecast, self.correction)

    @classmethod
    def from_scores(
        cls,
        scores_TB: Tensor,
        threshold: float,
        forecast_TBK: Tensor | None = None,
        correction_TJ: Tensor | None = None,
        segments: tuple[int, ...] | None = None,
    ) -> "Plan":
        """Compute where r > tau, and everywhere in row T-1.

        Args:
            forecast_TBK: learned weights, K of each entry.
            correction_TJ: learned weights of the output's correction, J of each step.
            segments: the first branch of each segment, where there are any.
        """
        if scores_TB.ndim != 2:
            raise ValueError(f"router scores have shape {tuple(scores_TB.shape)}: give a T x B table")
        if correction_TJ is not None and correction_TJ.ndim != 2:
            raise ValueError(f"the correction has shape {tuple(correction_TJ.shape)}: give a T x J table")
        compute_TB = scores_TB.detach() > threshold
        compute_TB[-1] = True
        forecast = None if forecast_TBK is None else forecast_of(forecast_TBK)
        correction = None if correction_TJ is None else correction_of(correction_TJ)
        return cls(tuple(tuple(row) for row in compute_TB.tolist()), forecast, correction, segments)

    @classmethod
    def full(cls, num_steps: int, num_branches: int) -> "Plan":
        """Return the plan that computes everything."""
        return cls(((True,) * num_branches,) * num_steps)

    def at_steps(self, num_steps: int) -> "Plan":
        """Return this plan stretched to another number of steps.

        Learned forecasts and corrections are left out, since they are for the distances between this plan's
        steps.
        """
        if num_steps == self.num_steps:
            return self
        scale = (self.num_steps - 1) / max(1, num_steps - 1)
        rows = [self.compute[round(i * scale)] for i in range(num_steps - 1)]
        return Plan((*rows, self.compute[-1]))

    @property
    def num_steps(self) -> int:
        """Return T, the number of sampling steps."""
        return len(self.compute)

    @property
    def num_branches(self) -> int:
        """Return B, the number of branches."""
        return len(self.compute[0])

    @property
    def corrections(self) -> int:
        """Return J, the number of differences that correct an output.

        It is 0 where none is corrected.
        """
        return len(self.correction[0]) if self.correction else 0

    @property
    def cur(self) -> float:
        """Cache utilisation ratio: reused entries / (T * B), row T-1 included."""
        entries = [entry for row in self.compute for entry in row]
        return 1 - sum(entries) / len(entries)

    def to_tensor(self) -> Tensor:
        """(T, B) bool."""
        return torch.tensor(self.compute)

    def to_strings(self) -> list[str]:
        """Return one string of 0 and 1 a step, step 0 first."""
        return ["".join("1" if entry else "0" for entry in row) for row in self.compute]

    def macs(self, macs: Macs) -> int:
        """Return the multiply-accumulates of a trajectory for one model row."""
        branches = sum(
            cost
            for row in self.compute
            for cost, is_computed in zip(macs.branches, row, strict=True)
            if is_computed
        )
        return branches + self.num_steps * macs.rest

    def ideal_speedup(self, macs: Macs) -> float:
        """Return full MACs / MACs under the plan."""
        return self.num_steps * macs.full / self.macs(macs)
