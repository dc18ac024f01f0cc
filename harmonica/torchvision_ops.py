"""Make `import timm` work when torchvision's compiled operators do not match torch's build.

torch from PyPI's CPU wheels beside torchvision's CUDA wheels leaves torchvision without its
compiled operators, and its Python files then fail at import because they attach fake kernels to
operators that nobody defined. Only the schemas are missing; nothing here ever calls them.
"""

import importlib.machinery
import importlib.util
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_KEEP_ALIVE: list[torch.library.Library] = []  # a Library's definitions go when it is collected


def ensure_torchvision_imports() -> None:
    """Define the operator schemas torchvision needs at import, only where its own cannot load."""
    if _KEEP_ALIVE or hasattr(torch.ops.torchvision, "nms"):
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    folder = Path(spec.origin).parent
    for compiled in (folder / f"_C{suffix}" for suffix in suffixes):
        if compiled.exists():
            try:
                torch.ops.load_library(str(compiled))
            except OSError:
                break
            return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS.values():
        library.define(schema)
    _KEEP_ALIVE.append(library)
