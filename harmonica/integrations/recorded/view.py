"""View a diffusers transformer as the branches that a recording found."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.core.cache import Reuse
from harmonica.core.plan import Correction, Forecast
from harmonica.integrations.recorded.block_stack import record_blocks
from harmonica.integrations.recorded.branches import BlockGraph, RecordedBranch, describe
from harmonica.integrations.recorded.kinds import (
    ARCHITECTURE_KEY,
    KINDS,
    RefusedTransformer,
    are_all_blocks,
    check_kinds,
    declaration_of,
)
from harmonica.integrations.recorded.recording import record
from harmonica.integrations.recorded.skipped import has_skipped
from harmonica.integrations.recorded.tensor_tags import tensors_of
from harmonica.integrations.recorded.unit_calls import ReplacedUnits
from harmonica.integrations.recorded.unit_passes import MixedPass, PlannedPass
from harmonica.integrations.recorded.unit_store import UnitStore
from harmonica.integrations.recorded.weights import fingerprint_of
from harmonica.models.base import Macs
from harmonica.models.fingerprint import Fingerprint


class RecordedTransformer:
    """Runs a transformer's branches under a plan or with the scores of a router.

    Its modules' forwards are replaced while it is in use; outside of a pass they are their own.
    """

    def __init__(
        self,
        transformer: nn.Module,
        forward: Callable[..., Any],
        *,
        cacheable: Sequence[str] = KINDS,
        is_compiled: bool = False,
    ) -> None:
        """Record nothing yet: branches are known after the first call.

        Args:
            forward: the transformer's own.
            cacheable: kinds of sub-modules that are branches.
            is_compiled: compute each of them as a graph of torch.compile.

        Raises:
            ValueError: no such kind.
        """
        check_kinds(cacheable)
        self.transformer, self.forward, self.cacheable = transformer, forward, tuple(cacheable)
        self.recorded_fingerprint: Fingerprint | None = None
        self.branches: tuple[RecordedBranch, ...] = ()
        self._graph: BlockGraph | None = None
        self._units = ReplacedUnits(transformer, is_compiled=is_compiled, are_blocks=self._is_stack)
        self._overwritten: frozenset[str] = frozenset()
        self._can_skip = True
        self._skipped_for = lru_cache(maxsize=64)(self._find_skipped)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_skipped_for"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._skipped_for = lru_cache(maxsize=64)(self._find_skipped)

    @property
    def _is_stack(self) -> bool:
        return are_all_blocks(self.cacheable)

    @property
    def is_recorded(self) -> bool:
        """Return whether the branches are known, as they are after the first call."""
        return self._graph is not None

    def record(self, *args: Any, **kwargs: Any) -> Any:
        """Find the branches in one forward, and return its output.

        Its arguments are those of a pipeline's call.

        Raises:
            RefusedTransformer: the class has no branches that a plan can reuse.
        """
        name = type(self.transformer).__name__
        if refused := declaration_of(self.transformer).refused:
            raise RefusedTransformer(f"transformer is a {name}, which has no plan: {refused}")
        look = record_blocks if self._is_stack else record
        recording = look(self.transformer, self.forward, *args, **kwargs)
        graph = BlockGraph(recording)
        branches = graph.chosen(self.cacheable)
        if not branches:
            raise RefusedTransformer(
                f"transformer is a {name}, which has no plan: in its forward no block of a ModuleList calls "
                "attention or feed-forward modules"
            )
        self._graph, self.branches = graph, branches
        self._overwritten = frozenset(unit.name for unit in recording.units if unit.is_overwritten)
        self._install()
        self._can_skip = self._probe(recording.output, *args, **kwargs)
        if self._is_stack and not self._can_skip:
            self.close()
            raise RefusedTransformer(
                f"cacheable is {self.cacheable!r}: a {name} reads what its blocks return after the last one, "
                f"give some of {', '.join(KINDS)}"
            )
        return recording.output

    def _install(self) -> None:
        assert self._graph is not None
        kept = self._branch_of
        feeders = self._graph.skippable(kept, kept)
        self._units.put_on(name.partition("#")[0] for name in (*kept, *feeders))

    def follow_modules(self) -> None:
        """Replace the forwards of modules that have come in place of recorded ones.

        An adapter does so.
        """
        if self.is_recorded:
            self._units.follow()

    def close(self) -> None:
        """Restore the transformer's modules."""
        self._units.take_off()
        self._graph = None

    @torch.no_grad()
    def _probe(self, output: Any, *args: Any, **kwargs: Any) -> bool:
        """Return whether a step of reuse can leave out what only branches read.

        It cannot where a block looks at values of what it gives its sub-modules.
        """
        kept, shapes = self.new_kept(), dict[str, Any]()
        nothing = (False,) * len(self.branches)
        self.planned(((True,) * len(self.branches)), kept, 1, shapes, args, kwargs)
        try:
            reused = self.planned(nothing, kept, 0, shapes, args, kwargs)
        except Exception:
            return False
        if has_skipped(reused):
            return False
        pairs = zip(tensors_of(output), tensors_of(reused), strict=True)
        return all(torch.allclose(one, other, equal_nan=True, rtol=1e-2) for one, other in pairs)

    @property
    def _branch_of(self) -> dict[str, int]:
        return {unit: place for place, branch in enumerate(self.branches) for unit in branch.units}

    def new_kept(
        self,
        reuse: Reuse = "hold",
        learned: Forecast | None = None,
        correction: Correction | None = None,
    ) -> UnitStore:
        """Return the empty values of one trajectory of one batch."""
        return UnitStore(self._branch_of, reuse, learned, correction)

    def planned(
        self,
        compute_row: Sequence[bool],
        kept: UnitStore,
        step: int,
        shapes: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        recompute: bool = False,
    ) -> Any:
        """Run one forward under a row of a plan.

        Args:
            shapes: what units of this trajectory returned, as stand-ins; filled as they are computed.
            recompute: backward computes branches again, in place of keeping what they need.
        """
        skipped = self._skipped_for(tuple(compute_row)) if self._can_skip else frozenset[str]()
        unit_pass = PlannedPass(
            compute_row,
            kept,
            step,
            skipped=skipped,
            shapes=shapes,
            overwritten=self._overwritten,
            recompute=recompute,
            recompute_others=recompute and self._is_stack,
        )
        self._units.keep_on()
        with self._units.board.during(unit_pass):
            output = self.forward(*args, **kwargs)
        if has_skipped(output):
            raise ValueError(
                f"the output of {type(self.transformer).__name__} depends on what its plan leaves out: "
                "modules have been replaced within a call; harmonica.remove, and apply the plan again"
            )
        return output if kept.correction is None else kept.corrected(step, output)

    def _find_skipped(self, compute_row: tuple[bool, ...]) -> frozenset[str]:
        assert self._graph is not None
        branch_of = self._branch_of
        reused = {unit for unit, branch in branch_of.items() if not compute_row[branch]}
        return frozenset(self._graph.skippable(reused, branch_of))

    def mixed(
        self,
        scores_B: Tensor,
        refresh_row: Sequence[bool],
        kept: UnitStore,
        step: int,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Run one forward of training, differentiable in the scores."""
        unit_pass = MixedPass(scores_B, refresh_row, kept, step, overwritten=self._overwritten)
        with self._units.board.during(unit_pass):
            return self.forward(*args, **kwargs)

    def macs(self) -> Macs:
        """Return the multiply-accumulates of the recorded forward for one row."""
        assert self._graph is not None, "recorded by the first forward"
        return self._graph.macs_of(self.branches)

    def call_bytes(self) -> int:
        """Return the bytes that the branches keep of the recorded call, all rows."""
        assert self._graph is not None, "recorded by the first forward"
        return self._graph.bytes_of(self.branches)

    def shape(self) -> dict[str, Any]:
        """Return class and branches as JSON values."""
        import diffusers

        return {
            "architecture": type(self.transformer).__name__,
            ARCHITECTURE_KEY: type(self.transformer).__name__,
            "diffusers": diffusers.__version__,
            "cacheable": list(self.cacheable),
            "branches": describe(self.branches),
        }

    def identity(self) -> dict[str, Any]:
        """Return class, branches and weights, which a router's must equal."""
        return {**self.shape(), "weights": self.fingerprint().exact}

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the weights without adapters."""
        return self.recorded_fingerprint or fingerprint_of([self.transformer])
