"""What the arms run on: a CPU in float32, or a GPU in each precision, eager and compiled.

No GPU was at hand when this was written: on one it has not been run. Precisions and compiled arms were tried
on a CPU (`--dtypes bfloat16 --compile`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from harmonica.models.base import BranchedTransformer

_Model = TypeVar("_Model", bound=BranchedTransformer)


@dataclass(frozen=True, slots=True)
class Hardware:
    """A device, a precision, and whether branches are compiled."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    compiled: bool = False

    @classmethod
    def here(cls, dtypes: Sequence[str] = (), *, compiled: bool | None = None) -> "list[Hardware]":
        """What there is: float32 and eager on a CPU; on a GPU bfloat16, eager and compiled, unless asked."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        names = dtypes or (("bfloat16",) if device == "cuda" else ("float32",))
        both = (False, True) if device == "cuda" else (False,)
        modes = both if compiled is None else (compiled,)
        return [cls(device, getattr(torch, name), mode) for name in names for mode in modes]

    @property
    def is_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def tolerance(self) -> float:
        """By which two ways of the same arithmetic may differ, relative and absolute."""
        return 1e-4 if self.dtype == torch.float32 else 1e-1

    def __str__(self) -> str:
        name = torch.cuda.get_device_name() if self.is_gpu else "CPU"
        mode = "compiled" if self.compiled else "eager"
        return f"{name}, {str(self.dtype).removeprefix('torch.')}, {mode}"

    def place(self, model: _Model) -> _Model:
        """A model of ours on the device, in the precision, as `load_model` would have it."""
        for name, parameter in model.named_parameters():
            dtype = torch.float32 if name.startswith(model.full_precision_parts) else self.dtype
            parameter.data = parameter.data.to(self.device, dtype)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.device)
        if self.compiled:
            model.execution = "compiled"
        return model


def compile_each(layers: Sequence[nn.Module]) -> None:
    """Regional compilation: layers that are alike share a graph."""
    for layer in layers:
        layer.compile()


PLAIN = Hardware()
