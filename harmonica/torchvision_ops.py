"""Let torchvision be imported where its operators do not fit torch's build.

A CPU build of torch beside PyPI's torchvision, which is built for CUDA, leaves torchvision without its
compiled operators. Its Python files then fail at import, because they describe operators that nobody
defined, and so does whatever imports torchvision: timm, transformers, and with them diffusers' pipelines.
Only the operators' schemas are missing; nothing here ever calls them.

`import torch` calls this too, as a plug-in (the entry point `torch.backends` in pyproject.toml), so that
diffusers can be imported before this package. TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns plug-ins off.
"""

import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

_PACKAGE = "torchvision"
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_KEEP_ALIVE: list[torch.library.Library] = []  # a Library's definitions go when it is collected


class _BeforeTorchvision:
    """Defines the schemas when torchvision is looked for; finds no module itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        if name == _PACKAGE and self in sys.meta_path:
            sys.meta_path.remove(self)
            _define_missing_schemas()


def ensure_torchvision_imports() -> None:
    """Make torchvision's first import define the schemas that it lacks, if any.

    Until then nothing is looked for or loaded.
    """
    is_waiting = any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path)
    if not (is_waiting or _KEEP_ALIVE or _PACKAGE in sys.modules):
        sys.meta_path.insert(0, _BeforeTorchvision())


def _define_missing_schemas() -> None:
    spec = importlib.machinery.PathFinder.find_spec(_PACKAGE)
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
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
    library = torch.library.Library(_PACKAGE, "FRAGMENT")
    for schema in _SCHEMAS.values():
        library.define(schema)
    _KEEP_ALIVE.append(library)
