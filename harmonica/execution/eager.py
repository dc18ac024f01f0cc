"""Branches run operation by operation, as torch comes.

Shapes: N batch, L tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from harmonica.execution.mixing import mix
from harmonica.execution.values import Scalars, ValueStore
from harmonica.models.base import Branch, BranchedTransformer, merge_of, run_all


@dataclass(frozen=True, slots=True)
class Addition:
    """The share of a computed value in a later step's sum.

    The step adds `total += weight * gate * y`.
    """

    total_NLD: Tensor
    """Changed in place."""
    gate_N1D: Tensor | None
    """Gate of the later step; None where the branch has none."""
    weight: float


class EagerRunner:
    """Runs branches one operation at a time; the other runners are compared with it."""

    def compute(
        self, branch: Branch, index: int, hidden_NLD: Tensor, conditioning: Any
    ) -> tuple[Tensor, Tensor]:
        """Compute and merge a branch.

        Args:
            index: the branch's place in the pass; the first one's input is left as it is.

        Returns:
            The next hidden state and y, both (N, L, D).
        """
        if branch.parts:
            after_NLD = self.run_all(branch.parts, hidden_NLD, conditioning)
            return self.run_all(branch.always, after_NLD, conditioning), after_NLD - hidden_NLD
        y_NLD = branch.compute(hidden_NLD, conditioning)
        return merge_of(branch, index)(hidden_NLD, y_NLD, conditioning), y_NLD

    def compute_and_add(
        self,
        branch: Branch,
        index: int,
        hidden_NLD: Tensor,
        conditioning: Any,
        additions: Sequence[Addition],
        scalars: Scalars,
    ) -> Tensor:
        """Compute and merge a branch, and add y to sums of later steps.

        Returns:
            The next hidden state (N, L, D).
        """
        hidden_NLD, y_NLD = self.compute(branch, index, hidden_NLD, conditioning)
        for each in additions:
            if each.gate_N1D is None:
                each.total_NLD.add_(y_NLD, alpha=each.weight)
            else:
                each.total_NLD.addcmul_(each.gate_N1D, y_NLD, value=each.weight)
        return hidden_NLD

    def reuse(
        self,
        branches: Sequence[Branch],
        indices: range,
        hidden_NLD: Tensor,
        conditioning: Any,
        store: ValueStore,
        step: int,
    ) -> Tensor:
        """Merge the kept values of neighbouring branches.

        Returns the next hidden state (N, L, D).

        Args:
            branches: all of the model's.
            indices: those to merge.
        """
        for index in indices:
            y_NLD = store.read(index, step)
            hidden_NLD = merge_of(branches[index], index)(hidden_NLD, y_NLD, conditioning)
        return hidden_NLD

    def mix(
        self,
        branch: Branch,
        index: int,
        hidden_NLD: Tensor,
        conditioning: Any,
        store: ValueStore,
        step: int,
        score: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Compute a branch, mix it with its kept value and merge the mix, in training.

        Args:
            score: r of the branch (), differentiable.

        Returns:
            The next hidden state and the mix, both (N, L, D).
        """
        y_NLD = mix(store.read(index, step), branch.compute(hidden_NLD, conditioning), score)
        return branch.merge(hidden_NLD, y_NLD, conditioning), y_NLD

    def run_all(self, branches: Sequence[Branch], hidden_NLD: Tensor, conditioning: Any) -> Tensor:
        """Compute and merge each of `branches`.

        Returns the hidden state (N, L, D) after them.
        """
        return run_all(branches, hidden_NLD, conditioning)

    def full_pass(self, model: BranchedTransformer, hidden_NLD: Tensor, conditioning: Any) -> Tensor:
        """Compute every branch and the head; returns (N, out_channels, H, W)."""
        return model.head(self.run_all(model.branches, hidden_NLD, conditioning), conditioning)
