"""The one interface everything turns on: a transformer seen as a list of residual branches.

Shapes: N batch, C channels, H W image, L tokens, D width.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

FINGERPRINT_VALUES = 64
"""First values a parameter: enough to tell trainings apart, nothing to read for a large model."""


def weights_fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """A digest of the first values of every parameter, in float32."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        first = parameter.detach().flatten()[:FINGERPRINT_VALUES].float().cpu()
        digest.update(name.encode() + first.numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class Fingerprint:
    """Tells checkpoints of one shape apart, also where they were rounded since."""

    exact: str
    """`weights_fingerprint` of the values as they are."""
    rounded: Mapping[str, str]
    """That of the values rounded to bfloat16 and to float16, by the precision's name."""

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> "Fingerprint":
        """Of all parameters of a model; only their first values are read."""
        first = {name: each.detach().flatten()[:FINGERPRINT_VALUES] for name, each in parameters.items()}
        rounded = {
            str(dtype).removeprefix("torch."): weights_fingerprint(
                {name: values.float().to(dtype) for name, values in first.items()}
            )
            for dtype in (torch.bfloat16, torch.float16)
        }
        return cls(weights_fingerprint(first), rounded)


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

    def merge_(self, hidden_NLD: Tensor, y_NLD: Tensor, conditioning: Any) -> Tensor:
        """`merge` that may write over `hidden_NLD`: a third less memory traffic."""
        return self.merge(hidden_NLD, y_NLD, conditioning)

    def gate(self, conditioning: Any) -> Tensor | None:
        """What `merge` multiplies y by, (N, 1, D); None where y is added as it is."""
        return None

    @property
    def has_post_branch(self) -> bool:
        """Whether `merge` also runs what is no branch, and so always runs: `post_branch`."""
        return False

    def post_branch(self, hidden_NLD: Tensor, conditioning: Any) -> Tensor:
        """What always runs behind the branch, on the hidden state that y has been added to."""
        return hidden_NLD


def merge_of(branch: Branch, index: int) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """How branch number `index` of a pass may be merged.

    The first hidden state is the caller's, the others are the pass's own, but autograd keeps them all.
    """
    return branch.merge_ if index and not torch.is_grad_enabled() else branch.merge


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
    num_classes: int = 0
    """Labels it takes; 0 for a model that takes prompts."""
    prediction: Literal["epsilon", "flow"] = "epsilon"
    """What its output is: the noise, or the velocity of flow matching, noise minus image."""
    full_precision_parts: tuple[str, ...] = ()
    """Prefixes of the parameters that a loader leaves in float32 when the model is in half precision."""
    recorded_fingerprint: Fingerprint | None = None
    """Of the weights as stored, set by whoever loads them: a router trained in bfloat16 fits the same
    checkpoint in float32. Whoever changes the weights later resets it to None."""

    @property
    def dtype(self) -> torch.dtype:
        """Of most weights: not of `full_precision_parts`."""
        own = (p for name, p in self.named_parameters() if not name.startswith(self.full_precision_parts))
        return next(own).dtype

    def prepare(self, condition_N: Any, timesteps: Sequence[float]) -> Sequence[Any]:
        """What does not depend on the sample, made ahead of a trajectory.

        Returns:
            Entry i is what `embed` takes in the condition's place at `timesteps[i]`. `StepConditionings`,
            where that is the whole conditioning: later steps' gates are then known ahead.
        """
        return [condition_N] * len(timesteps)

    @abstractmethod
    def embed(self, sample_NCHW: Tensor, timestep_N: Tensor, condition_N: Any) -> tuple[Tensor, Any]:
        """Tokens (N, L, D) and whatever the branches and the head need of (timestep, condition)."""

    @abstractmethod
    def head(self, hidden_NLD: Tensor, conditioning: Any) -> Tensor:
        """The model's output (N, out_channels, H, W)."""

    @property
    def repeated_layers(self) -> Sequence[nn.Module]:
        """The sub-layers of its blocks, alike from block to block: what pays to compile once for all."""
        return ()

    @property
    @abstractmethod
    def value_shape(self) -> tuple[int, int]:
        """(L, D) of every branch's y: tokens and width."""

    def text_shape(self) -> tuple[int, int]:
        """Width of the embeddings it takes and the number of tokens they are padded to."""
        raise TypeError(f"{type(self).__name__} takes labels")

    def size_conditioning(self) -> tuple[int, int] | None:
        """Height and width that its condition has to say, where it was trained with them."""
        return None

    @abstractmethod
    def guided_condition(self, condition_N: Any) -> Any:
        """(M = 2N rows) the conditional ones, then their unconditional twins: classifier-free guidance."""

    @abstractmethod
    def macs(self) -> Macs:
        """Arithmetic of one forward for one sample."""

    @abstractmethod
    def shape(self) -> dict[str, Any]:
        """Architecture and shape, JSON-ready."""

    def identity(self) -> dict[str, Any]:
        """What a router must have been made for: architecture, shape and weights."""
        return {**self.shape(), "weights": self.fingerprint().exact}

    def fingerprint(self) -> Fingerprint:
        """Tells checkpoints of one shape apart, whatever precision they were loaded in."""
        return self.recorded_fingerprint or Fingerprint.of(dict(self.named_parameters()))

    def forward(self, sample_NCHW: Tensor, timestep_N: Tensor, condition_N: Any) -> Tensor:
        """The whole model, every branch computed."""
        return self.full_pass(*self.embed(sample_NCHW, timestep_N, condition_N))

    def full_pass(self, hidden_NLD: Tensor, conditioning: Any) -> Tensor:
        """Every branch computed and the head, from what `embed` gave: (N, out_channels, H, W)."""
        for index, branch in enumerate(self.branches):
            y_NLD = branch.compute(hidden_NLD, conditioning)
            hidden_NLD = merge_of(branch, index)(hidden_NLD, y_NLD, conditioning)
        return self.head(hidden_NLD, conditioning)


def unpatchify(patches_NLP: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Put patches, each (patch_size, patch_size, C) in a row, together to images (N, C, H, W).

    Args:
        grid: patches along height and width; L in all, row by row.
    """
    (rows, columns), p = grid, patch_size
    image = patches_NLP.unflatten(2, (p, p, -1)).unflatten(1, grid).permute(0, 5, 1, 3, 2, 4)
    return image.reshape(len(patches_NLP), -1, rows * p, columns * p)


def freeze(model: torch.nn.Module) -> None:
    """Put a model into evaluation mode, without gradients of its weights, as SDT expects the base model."""
    model.eval().requires_grad_(False)
