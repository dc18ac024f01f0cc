"""The one interface everything turns on: a transformer seen as a list of residual branches.

Shapes: N batch, C channels, H W image, L tokens, D width.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_FINGERPRINT_VALUES = 64  # a parameter; enough to tell trainings apart, nothing to read for a large model


class Branch(ABC):
    """One residual sub-layer of a block, taken before its gate and its add: the unit of caching."""

    name: str
    """As in the router's columns and pictures: `attn 0`, `mlp 0`, `attn 1`, ..."""
    macs: int
    """Multiply-accumulates of `compute` for one sample, without its modulation."""

    @abstractmethod
    def compute(self, hidden_NLD: Tensor, conditioning: Any) -> Tensor:
        """Norm, modulation and sub-layer: y (N, L, D)."""

    @abstractmethod
    def merge(self, hidden_NLD: Tensor, y_NLD: Tensor, conditioning: Any) -> Tensor:
        """Gate and add: the next hidden state (N, L, D). All that a reused branch costs."""


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one forward for one sample."""

    branches: tuple[int, ...]
    """One entry a branch, in order."""
    rest: int
    """Embedding, conditioning with its modulations, and head: never cached."""

    @property
    def full(self) -> int:
        return sum(self.branches) + self.rest


class BranchedTransformer(nn.Module, ABC):
    """A frozen denoiser split into `embed`, `branches` and `head`; nothing else knows its insides."""

    branches: Sequence[Branch]
    in_channels: int
    out_channels: int
    sample_size: int

    @abstractmethod
    def embed(self, sample_NCHW: Tensor, timestep_N: Tensor, condition_N: Tensor) -> tuple[Tensor, Any]:
        """Tokens (N, L, D) and whatever the branches and the head need of (timestep, condition)."""

    @abstractmethod
    def head(self, hidden_NLD: Tensor, conditioning: Any) -> Tensor:
        """The model's output (N, out_channels, H, W)."""

    @abstractmethod
    def null_condition(self, condition_N: Tensor) -> Tensor:
        """The unconditional twin of `condition_N`, for classifier-free guidance."""

    @abstractmethod
    def macs(self) -> Macs:
        """Arithmetic of one forward for one sample."""

    @abstractmethod
    def shape(self) -> dict[str, Any]:
        """Architecture and shape, JSON-ready."""

    def identity(self) -> dict[str, Any]:
        """What a router must have been made for: architecture, shape and weights."""
        return {**self.shape(), "weights": self.fingerprint()}

    def fingerprint(self) -> str:
        """Tells checkpoints of one shape apart: a digest of the first values of every parameter."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.named_parameters()):
            first = parameter.detach().flatten()[:_FINGERPRINT_VALUES].float().cpu()
            digest.update(name.encode() + first.numpy().tobytes())
        return f"sha256:{digest.hexdigest()[:16]}"

    def forward(self, sample_NCHW: Tensor, timestep_N: Tensor, condition_N: Tensor) -> Tensor:
        """The whole model, every branch computed."""
        return self.full_pass(*self.embed(sample_NCHW, timestep_N, condition_N))

    def full_pass(self, hidden_NLD: Tensor, conditioning: Any) -> Tensor:
        """Every branch computed and the head, from what `embed` gave: (N, out_channels, H, W)."""
        for branch in self.branches:
            y_NLD = branch.compute(hidden_NLD, conditioning)
            hidden_NLD = branch.merge(hidden_NLD, y_NLD, conditioning)
        return self.head(hidden_NLD, conditioning)
