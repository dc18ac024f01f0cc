"""Fingerprints of weights, which tell the checkpoints of one shape apart."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FINGERPRINT_VALUES = 64
"""Number of values read of each parameter: enough to tell checkpoints apart, and cheap for a large model."""


def weights_fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """Return a digest of the first values of every parameter, in float32."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        first = parameter.detach().flatten()[:FINGERPRINT_VALUES].float().cpu()
        digest.update(name.encode() + first.numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class Fingerprint:
    """Digests that tell checkpoints of one shape apart, even after rounding."""

    exact: str
    """`weights_fingerprint` of the values as they are."""
    rounded: Mapping[str, str]
    """`weights_fingerprint` of the values rounded to bfloat16 and to float16, by the precision's name."""

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> "Fingerprint":
        """Compute the fingerprint of a model's parameters from their first values."""
        first = {name: each.detach().flatten()[:FINGERPRINT_VALUES] for name, each in parameters.items()}
        rounded = {
            str(dtype).removeprefix("torch."): weights_fingerprint(
                {name: values.float().to(dtype) for name, values in first.items()}
            )
            for dtype in (torch.bfloat16, torch.float16)
        }
        return cls(weights_fingerprint(first), rounded)
