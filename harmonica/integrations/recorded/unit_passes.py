"""Run a recorded transformer under a plan, or with the scores of a router.

They are the counterparts of `harmonica.core.passes`, with the transformer's own forward for the walk.
"""

from collections.abc import Container, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

from harmonica.execution.mixing import mix
from harmonica.integrations.recorded.skipped import skipped_like
from harmonica.integrations.recorded.unit_store import UnitStore


class PlannedPass:
    """Runs a forward under a plan's row: computes, reuses or skips each unit."""

    def __init__(
        self,
        compute_row: Sequence[bool],
        kept: UnitStore,
        step: int,
        *,
        skipped: Container[str] = (),
        shapes: dict[str, Any],
        overwritten: Container[str] = (),
        recompute: bool = False,
        recompute_others: bool = False,
    ) -> None:
        """Compute or reuse in one step what its row says.

        Args:
            skipped: units whose output nothing reads under this row.
            shapes: what such units returned, as stand-ins; computed units are added.
            overwritten: units whose output the block changes in place, so that it gets a copy.
            recompute: backward computes branches again, in place of keeping what they need.
            recompute_others: it computes the units that no branch keeps again, too.
        """
        self._recompute_others = recompute_others
        self._row, self._kept, self._step, self._recompute = compute_row, kept, step, recompute
        self._skipped, self._shapes, self._overwritten = skipped, shapes, overwritten

    def run(self, unit: str, forward: partial[Any]) -> Any:
        """Return a unit's output: computed, kept or a stand-in."""
        branch = self._kept.branch_of.get(unit)
        if branch is None:
            return self._run_other(unit, forward)
        if self._row[branch] or unit not in self._kept:
            output = _recomputed(forward) if self._recompute else forward()
            kept = _copied(output) if unit in self._overwritten else output
            self._kept.write(unit, self._step, kept)
            return output
        output = self._kept.read(unit, self._step)
        return _copied(output) if unit in self._overwritten else output

    def _run_other(self, unit: str, forward: partial[Any]) -> Any:
        if unit in self._skipped and unit in self._shapes:
            return self._shapes[unit]
        output = _recomputed(forward) if self._recompute_others else forward()
        if unit not in self._shapes:
            self._shapes[unit] = skipped_like(output)
        return output


class MixedPass:
    """Runs a forward of training: each branch gives `r * computed + (1-r) * kept`."""

    def __init__(
        self,
        scores_B: Tensor,
        refresh_row: Sequence[bool],
        kept: UnitStore,
        step: int,
        *,
        overwritten: Container[str] = (),
    ) -> None:
        """Mix kept and computed outputs in one step.

        Args:
            scores_B: r of each branch (B,).
            refresh_row: the branches whose kept value becomes the mixed one.
        """
        self._scores_B, self._row, self._kept, self._step = scores_B, refresh_row, kept, step
        self._overwritten = overwritten
        self._before = kept.copy()

    def run(self, unit: str, forward: partial[Any]) -> Any:
        """Return a unit's output: the kept and the computed one, mixed by its score."""
        branch = self._kept.branch_of.get(unit)
        if branch is None:
            return forward()
        computed = forward()
        if unit not in self._before:  # the first step did not call it
            self._kept.write(unit, self._step, computed)
            return computed
        cached = self._before.read(unit, self._step)
        score = self._scores_B[branch]

        def mix_one(old: Any, new: Any) -> Any:
            if not isinstance(new, Tensor) or not new.is_floating_point():
                return new
            return mix(old, new, score)

        output = _pytree.tree_map(mix_one, cached, computed)
        if self._row[branch]:
            kept = _copied(output) if unit in self._overwritten else output
            self._kept.write(unit, self._step, kept)
        return output


def _recomputed(forward: partial[Any]) -> Any:
    """Return a unit's output, which backward computes again.

    The arguments are saved as those of any operation are, so that they may go to the host's memory.
    """
    compute = forward.func
    leaves, spec = _pytree.tree_flatten((forward.args, forward.keywords))

    def run(*leaves: Any) -> Any:
        args, kwargs = _pytree.tree_unflatten(leaves, spec)
        return compute(*args, **kwargs)

    return checkpoint(run, *leaves, use_reentrant=False, preserve_rng_state=False)


def _copied(output: Any) -> Any:
    return _pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, output)
