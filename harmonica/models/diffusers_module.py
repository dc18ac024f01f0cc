"""Loading of a diffusers transformer's own module from memory-mapped weights."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.io.safe_load import check_state
from harmonica.io.weight_files import read_json, read_weights
from harmonica.io.weight_values import check_values
from harmonica.torchvision_ops import ensure_torchvision_imports


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredModule:
    """A transformer's folder: its configuration and its memory-mapped tensors."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)

    @classmethod
    def read(cls, folder: Path) -> "StoredModule":
        """Read a module's folder.

        Raises:
            ValueError: no usable config.json or weights.
        """
        return cls(folder=folder, config=read_json(folder / "config.json"), tensors=read_weights(folder))

    def assemble(
        self,
        module_class: Any,
        device: str | torch.device,
        dtype: torch.dtype,
        full_precision_parts: tuple[str, ...] = (),
    ) -> Any:
        """Build the frozen module; no weight is allocated before it is read.

        Args:
            full_precision_parts: prefixes of parameters that stay in float32.

        Raises:
            ValueError: the weights do not fit the configuration, are zero, or not finite; names which.
        """
        ensure_torchvision_imports()
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            module: Any = module_class.from_config(self.config)
        # Tables that older versions stored and newer ones make themselves are left alone.
        skipped = getattr(module_class, "_keys_to_ignore_on_load_unexpected", None) or []
        state = {n: t for n, t in self.tensors.items() if not any(re.search(p, n) for p in skipped)}
        wanted = module.state_dict()
        check_state(wanted, state, f"model.path {self.folder}")
        placed = {
            name: state[name].to(device, torch.float32 if name.startswith(full_precision_parts) else dtype)
            for name in wanted
        }
        check_values(placed, f"model.path {self.folder}")
        module.load_state_dict(placed, assign=True)
        return module.to(device).eval().requires_grad_(False)
