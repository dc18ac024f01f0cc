"""Checks that weights are finite, and not zero where they must not be.

The tensors that may be all zero follow from the arithmetic. Biases and the gains of norms, of one dimension,
may; so may the layers that adaLN-Zero starts at zero, `adaLN_modulation` and the output layer, and PixArt's
output projection of cross-attention, in a model that is not trained yet. But with a zero patch embedding the
model sees nothing, and a zero matrix of self-attention or an MLP makes its branch the same for every input;
both are initialised with random numbers, and no training takes all of them back to zero.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_NEVER_ZERO = re.compile(r"(^|\.)(x_embedder|patch_embed|pos_embed\.proj|attn1?|attn2\.to_[qkv]|mlp|ff)\.")
_FIRST = 4096
"""Number of values of a tensor that `first_fault` reads: a page or two of a memory map."""


def _may_be_zero(name: str, tensor: Tensor) -> bool:
    return tensor.ndim < 2 or _NEVER_ZERO.search(name) is None


def _looked_at(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
    }


@torch.no_grad()
def check_values(state: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights with a tensor that is not finite, or wrongly all zero.

    Every value is read once, some 8 GB a second and core from memory, and nothing is allocated. On a GPU the
    host waits for it once.

    Args:
        state: tensors by the names of their layout, on one device.

    Raises:
        ValueError: the message names the tensor, the number of others, and the cure.
    """
    tensors = _looked_at(state)
    if not tensors:
        return
    extremes_P2 = torch.stack([torch.stack(torch.aminmax(value)).float() for value in tensors.values()])
    broken, zero = [], []
    for (name, value), (low, high) in zip(tensors.items(), extremes_P2.tolist(), strict=True):
        if not -torch.inf < low <= high < torch.inf:  # NaN is in no order
            broken.append(name)
        elif low == high == 0 and not _may_be_zero(name, value):
            zero.append(name)
    if broken:
        dtype = str(tensors[broken[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"{source} has {_counted(broken)} not finite in {dtype}: take a checkpoint from before its "
            "training diverged"
            + (
                ", or set model.dtype to bfloat16 or float32, which have no limit at 65504"
                * (dtype == "float16")
            )
        )
    if zero:
        raise ValueError(
            f"{source} has {_counted(zero)} all zero, which no trained model has: take a checkpoint whose "
            "weights were saved after they were set"
        )


def first_fault(state: Mapping[str, Any]) -> str:
    """Return the first fault found in a state dict; "" for none.

    It reads the first values of each tensor, which is cheap on a memory map, and enough: training that
    diverges leaves no tensor finite, and an average that was never updated is zero throughout. A tensor that
    begins with zeros is read in full.
    """
    for name, value in _looked_at(state).items():
        first = value.detach().flatten()[:_FIRST]
        if not first.isfinite().all():
            return f"{name} is not finite"
        if not _may_be_zero(name, value) and not first.any() and not value.any():
            return f"{name} is all zero"
    return ""


def _counted(names: list[str]) -> str:
    if len(names) == 1:
        return f"{names[0]}"
    return f"{names[0]} and {len(names) - 1} more tensors"
