"""The interface of all models: a transformer seen as a list of residual branches.

Shapes: N batch, C channels, H W image, L tokens, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harmonica.models.fingerprint import Fingerprint


class Branch(ABC):
    """The unit of caching: a residual sub-layer before its gate and its addition."""

    name: str
    """Name in tables and plots: `attn 0`, `mlp 0`, `attn 1`, ..."""
    kind: str
    """`attn`, `cross` or `mlp`: branches of one class and kind do the same arithmetic."""
    macs: int
    """Multiply-accumulates of `compute` for one sample, without its modulation."""
    parts: "Sequence[Branch]" = ()
    """The branches that it consists of, where these are reused as one (`harmonica.core.segments`)."""

    @abstractmethod
    def inputs(self, conditioning: Any) -> tuple[Any, ...]:
        """Return what `run` takes of the conditioning: views of this branch's own part."""

    @abstractmethod
    def run(self, hidden_NLD: Tensor, *inputs: Any) -> Tensor:
        """Run norm, modulation and sub-layer; returns y (N, L, D).

        Looks at nothing that differs between branches of a kind except their weights, so that one compiled
        graph serves all of them.
        """

    def gate(self, conditioning: Any) -> Tensor | None:
        """Return the factor (N, 1, D) of y in `merge`; None if y is added unscaled."""
        return None

    def compute(self, hidden_NLD: Tensor, conditioning: Any) -> Tensor:
        """Run the branch with its part of the conditioning; returns y (N, L, D)."""
        return self.run(hidden_NLD, *self.inputs(conditioning))

    def merge(self, hidden_NLD: Tensor, y_NLD: Tensor, conditioning: Any) -> Tensor:
        """Gate y and add it; returns the next hidden state (N, L, D).

        A reused branch costs only this.
        """
        return self.post_branch(add_gated(hidden_NLD, self.gate(conditioning), y_NLD), conditioning)

    def merge_(self, hidden_NLD: Tensor, y_NLD: Tensor, conditioning: Any) -> Tensor:
        """Merge and overwrite `hidden_NLD`: a third less memory traffic."""
        gate = self.gate(conditioning)
        merged = hidden_NLD.add_(y_NLD) if gate is None else hidden_NLD.addcmul_(gate, y_NLD)
        return self.post_branch(merged, conditioning)

    @property
    def always(self) -> "Sequence[Branch]":
        """The uncached sub-layers after the branch, which run at every merge."""
        return ()

    @property
    def alone(self) -> "Branch":
        """The branch without the uncached sub-layers after it."""
        return self

    @property
    def has_post_branch(self) -> bool:
        """Whether `post_branch` runs sub-layers, which are never cached."""
        return bool(self.always)

    def post_branch(self, hidden_NLD: Tensor, conditioning: Any) -> Tensor:
        """Run the uncached sub-layers after the branch, on the merged hidden state."""
        return run_all(self.always, hidden_NLD, conditioning)


def add_gated(hidden_NLD: Tensor, gate_N1D: Tensor | None, y_NLD: Tensor) -> Tensor:
    """Return `hidden + gate * y`, or `hidden + y` without a gate."""
    return hidden_NLD + y_NLD if gate_N1D is None else torch.addcmul(hidden_NLD, gate_N1D, y_NLD)


def merge_of(branch: Branch, index: int) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """Return the in-place merge where it is safe, else the other one.

    It is not safe for the first branch of a pass, whose input belongs to the caller, nor under autograd,
    which keeps all hidden states.
    """
    return branch.merge_ if index and not torch.is_grad_enabled() else branch.merge


def run_all(branches: Sequence[Branch], hidden_NLD: Tensor, conditioning: Any) -> Tensor:
    """Compute and merge each of `branches`; returns the hidden state after them."""
    for index, branch in enumerate(branches):
        y_NLD = branch.compute(hidden_NLD, conditioning)
        hidden_NLD = merge_of(branch, index)(hidden_NLD, y_NLD, conditioning)
    return hidden_NLD


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one forward for one sample."""

    branches: tuple[int, ...]
    """MACs of each branch, in order."""
    rest: int
    """MACs of embedding, conditioning with its modulations, and head, which are never cached."""

    @property
    def full(self) -> int:
        """Return the MACs of a step that reuses nothing."""
        return sum(self.branches) + self.rest


Execution = Literal["eager", "compiled", "graphed"]
"""How branches are run (`harmonica.execution`)."""


class BranchedTransformer(nn.Module, ABC):
    """A frozen denoiser split into `embed`, `branches` and `head`."""

    branches: Sequence[Branch]
    in_channels: int
    out_channels: int
    sample_size: int
    num_classes: int = 0
    """Number of class labels; 0 for a model that takes prompts."""
    prediction: Literal["epsilon", "flow"] = "epsilon"
    """Prediction type: the noise, or the velocity of flow matching (noise minus image)."""
    full_precision_parts: tuple[str, ...] = ()
    """Prefixes of the parameters that a loader leaves in float32 when the model is in half precision."""
    execution: Execution = "eager"
    """How the branches are run; loaders set it."""
    graph_bytes: int = 8 * 2**30
    """Most memory of recorded trajectories where `execution` is graphed."""
    graphs: Any = None
    """The recorded trajectories (`harmonica.execution.graphs.GraphStore`), once there are some."""
    residual_dtype: torch.dtype | None = None
    """Precision of the residual stream; None is that of the first layer."""
    recorded_fingerprint: Fingerprint | None = None
    """Fingerprint of the weights as stored. Loaders set it, so that a router trained in bfloat16 fits the
    same checkpoint in float32. Code that changes the weights later resets it to None."""

    @property
    def is_flow_matching(self) -> bool:
        """Whether the model predicts the velocity of flow matching."""
        return self.prediction == "flow"

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights outside `full_precision_parts`."""
        own = (p for name, p in self.named_parameters() if not name.startswith(self.full_precision_parts))
        return next(own).dtype

    def prepare(self, condition_N: Any, timesteps: Sequence[float]) -> Sequence[Any]:
        """Compute ahead of a trajectory what does not depend on the sample.

        Returns:
            One entry a timestep, which `embed` takes in place of the condition. `StepConditionings` if an
            entry is the whole conditioning: the gates of later steps are then known ahead.
        """
        return [condition_N] * len(timesteps)

    @abstractmethod
    def embed(self, sample_NCHW: Tensor, timestep_N: Tensor, condition_N: Any) -> tuple[Tensor, Any]:
        """Return tokens (N, L, D) and the conditioning of the branches and the head."""

    def as_residual(self, hidden_NLD: Tensor) -> Tensor:
        """Return tokens (N, L, D) in the precision of the residual stream."""
        return hidden_NLD if self.residual_dtype is None else hidden_NLD.to(self.residual_dtype)

    @abstractmethod
    def head(self, hidden_NLD: Tensor, conditioning: Any) -> Tensor:
        """Compute the model's output (N, out_channels, H, W)."""

    @property
    @abstractmethod
    def value_shape(self) -> tuple[int, int]:
        """Tokens and width (L, D) of every branch's y."""

    def text_shape(self) -> tuple[int, int]:
        """Return the width of the text embeddings and their padded number of tokens."""
        raise TypeError(f"{type(self).__name__} takes labels")

    def size_conditioning(self) -> tuple[int, int] | None:
        """Return the height and width in pixels that the condition must carry, or None."""
        return None

    @abstractmethod
    def guided_condition(self, condition_N: Any) -> Any:
        """Return the N conditions, then their N unconditional ones, for guidance."""

    @abstractmethod
    def macs(self) -> Macs:
        """Return the multiply-accumulates of one forward for one sample."""

    @abstractmethod
    def shape(self) -> dict[str, Any]:
        """Return architecture and shape as JSON values."""

    def identity(self) -> dict[str, Any]:
        """Return architecture, shape and weights, which a router's must equal."""
        return {**self.shape(), "weights": self.fingerprint().exact}

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the weights as they were stored."""
        return self.recorded_fingerprint or Fingerprint.of(dict(self.named_parameters()))

    def forward(self, sample_NCHW: Tensor, timestep_N: Tensor, condition_N: Any) -> Tensor:
        """Run the whole model with every branch computed."""
        return self.full_pass(*self.embed(sample_NCHW, timestep_N, condition_N))

    def full_pass(self, hidden_NLD: Tensor, conditioning: Any) -> Tensor:
        """Compute every branch and the head; returns (N, out_channels, H, W)."""
        return self.head(run_all(self.branches, hidden_NLD, conditioning), conditioning)


def unpatchify(patches_NLP: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Assemble images (N, C, H, W) from patches.

    Args:
        patches_NLP: each patch holds (patch_size, patch_size, C) flattened.
        grid: patches along height and width; L in all, row by row.
    """
    (rows, columns), p = grid, patch_size
    image: Tensor = patches_NLP.unflatten(2, (p, p, -1)).unflatten(1, grid).permute(0, 5, 1, 3, 2, 4)
    return image.reshape(len(patches_NLP), -1, rows * p, columns * p)


def freeze(model: torch.nn.Module) -> None:
    """Put a model into evaluation mode, without gradients of its weights."""
    model.eval().requires_grad_(False)
