"""Find a recorded forward's branches: what each keeps, skips and costs."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from harmonica.integrations.recorded.kinds import RecordedKind
from harmonica.integrations.recorded.recording import Recording, Unit
from harmonica.integrations.recorded.tensor_tags import INPUT
from harmonica.models.base import Macs


@dataclass(frozen=True)
class RecordedBranch:
    """Names one or more units whose outputs are kept together."""

    name: str
    """Path of the sub-module whose output is kept, the first where there are several."""
    kind: RecordedKind
    units: tuple[str, ...]
    """Units whose outputs are kept, in the order of calls."""
    macs: int
    """Multiply-accumulates of one row that a reuse saves, with those of units that only it reads."""


class BlockGraph:
    """Holds the units of a forward and which of them read which."""

    def __init__(self, recording: Recording) -> None:
        self.units = {unit.name: unit for unit in recording.units}
        self.rows, self.macs = recording.rows, recording.macs
        self._readers: dict[str, list[str]] = {name: [] for name in self.units}
        for unit in recording.units:
            for name in unit.reads - {INPUT}:
                if name in self._readers:
                    self._readers[name].append(unit.name)

    def skippable(self, reused: Container[str], kept: Container[str] = ()) -> set[str]:
        """Return the units read only by these reused units and other skippable ones.

        Args:
            kept: units whose output is kept, and which are computed where they are not reused.
        """
        found: set[str] = set()
        for name in reversed(self.units):
            readers = self._readers[name]
            if name in reused or name in kept or self.units[name].reaches_output or not readers:
                continue
            if all(reader in reused or reader in found for reader in readers):
                found.add(name)
        return found

    def ends(self, unit: Unit) -> frozenset[str]:
        """Return the units to keep in place of a unit: itself, or all it flows into.

        A later unit replaces it if that reads nothing of the block's own input, as do the projection at the
        end of a single-stream block and the norm of an attention's output.
        """
        follow = [self.units[name] for name in self._readers[unit.name]]
        if unit.reaches_output or not follow or any(INPUT in each.reads for each in follow):
            return frozenset((unit.name,))
        return frozenset[str]().union(*(self.ends(each) for each in follow))

    @cached_property
    def branches(self) -> tuple[RecordedBranch, ...]:
        """Return all branches of the forward, in the order of calls."""
        groups: list[tuple[set[str], set[RecordedKind]]] = []
        for unit in self.units.values():
            if unit.kind is None or not self._counts(unit):
                continue
            ends, kinds = set(self.ends(unit)), {unit.kind}
            for other in [group for group in groups if group[0] & ends]:
                groups.remove(other)
                ends, kinds = ends | other[0], kinds | other[1]
            groups.append((ends, kinds))
        order = {name: place for place, name in enumerate(self.units)}
        kept = {name for ends, _ in groups for name in ends}
        found = [self._branch(sorted(ends, key=order.__getitem__), kinds, kept) for ends, kinds in groups]
        return tuple(sorted(found, key=lambda branch: order[branch.units[0]]))

    def _counts(self, unit: Unit) -> bool:
        """Return whether the unit costs something and anything reads it."""
        return unit.macs > 0 and (unit.reaches_output or bool(self._readers[unit.name]))

    def _branch(self, ends: list[str], kinds: set[RecordedKind], kept: set[str]) -> RecordedBranch:
        saved = self.skippable(ends, kept) | set(ends)
        macs = sum(self.units[name].macs for name in saved) // self.rows
        kind = next(iter(kinds)) if len(kinds) == 1 else "single"
        return RecordedBranch(ends[0], kind, tuple(ends), macs)

    def chosen(self, cacheable: Sequence[str]) -> tuple[RecordedBranch, ...]:
        """Return the branches of these kinds."""
        return tuple(branch for branch in self.branches if branch.kind in cacheable)

    def macs_of(self, branches: Sequence[RecordedBranch]) -> Macs:
        """Return the costs of one forward for one row."""
        each = tuple(branch.macs for branch in branches)
        return Macs(each, self.macs // self.rows - sum(each))

    def bytes_of(self, branches: Sequence[RecordedBranch]) -> int:
        """Return the bytes that these branches keep of the recorded call, all rows."""
        return sum(self.units[name].nbytes for branch in branches for name in branch.units)


def describe(branches: Sequence[RecordedBranch]) -> list[dict[str, Any]]:
    """Return the branches as JSON values."""
    return [{"name": branch.name, "kind": branch.kind, "units": list(branch.units)} for branch in branches]
