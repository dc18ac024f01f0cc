"""Try whether torch.compile makes anything here."""

import functools

import torch
from torch import Tensor


def _next(x: Tensor) -> Tensor:
    return x + 1


@functools.cache
def compiler_fault(device_type: str) -> str:
    """Return why torch.compile fails for a kind of device, or "" if it works.

    It fails where a C compiler or Triton is missing.
    """
    try:
        torch.compile(_next, dynamic=False)(torch.zeros(1, device=device_type))
    except Exception as error:  # of Dynamo, of the backend, of a subprocess: none has one base class
        said = str(error).strip() or type(error).__name__
        return said.splitlines()[0]
    return ""
