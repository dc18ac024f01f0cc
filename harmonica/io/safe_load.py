"""The reading of weights, which executes no pickle.

Files are safetensors, or are loaded with `weights_only`.
"""

import argparse
import pickle
import re
import struct
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from harmonica.io.paths import local
from harmonica.io.state_dicts import find_state
from harmonica.io.weight_values import check_values

Format = Literal["zip", "old", "safetensors"]
_HEAD = 256
_OLD_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # begins what torch.save wrote before PyTorch 1.6
_REFUSED = re.compile(r"(?:GLOBAL|global|class|function) ([\w.]+\.[\w.]+)")
"""The name in the message by which `weights_only` refuses a pickle."""
_REPEATED_BYTES = 2**20  # a checkpoint may have small buffers that are views of fewer values
_NAMED = 5  # keys of each kind that an error names


def _format_of(path: Path) -> Format:
    """Return the format of a file by its first bytes, whatever its name.

    Raises:
        ValueError: it is no checkpoint; the message says what it is.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[:1] == b"\x80" and _OLD_MAGIC in head[:32]:
        return "old"
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return "safetensors"
    if not head:
        words = "cannot be read, it may be truncated: fetch it again (it is empty)"
    elif head.startswith(b"version https://git-lfs"):
        words = "is a pointer of Git LFS and not the weights: run git lfs pull where it lies"
    elif head.lstrip()[:1] == b"<":
        words = "is a web page and no checkpoint: fetch the file itself"
    else:
        words = f"is no checkpoint, it begins with {head[:12]!r}: give what torch.save or safetensors wrote"
    raise ValueError(f"checkpoint {path} {words}")


def _read_pt(path: Path, kind: Format) -> Any:
    try:
        # Namespace: the released training script stores its arguments beside the tensors.
        with torch.serialization.safe_globals([argparse.Namespace]):
            if kind == "zip" and path.suffix != ".safetensors":  # by which torch.load goes
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, struct.error) as error:
        refused = _REFUSED.search(str(error))
        if refused or (kind == "zip" and isinstance(error, pickle.UnpicklingError)):
            named = f" ({refused[1]} would have to be executed)" if refused else ""
            raise ValueError(
                f"checkpoint {path} holds more than tensors and is refused{named}: save its state dict alone"
            ) from error
        raise ValueError(
            f"checkpoint {path} cannot be read, it may be truncated: fetch it again ({_reason(error)})"
        ) from error


def _check_sizes(contents: Any, path: Path) -> None:
    """Refuse tensors that are larger than what is stored of them.

    A file of a kilobyte that repeats one value would take all memory.

    Raises:
        ValueError: there is one of more than `_REPEATED_BYTES`, or a sparse one.
    """
    if isinstance(contents, Mapping):
        for value in contents.values():
            _check_sizes(value, path)
    elif isinstance(contents, Tensor):
        is_dense, size = contents.layout is torch.strided, contents.numel() * contents.element_size()
        if not is_dense or size > max(_REPEATED_BYTES, contents.untyped_storage().nbytes()):
            raise ValueError(
                f"checkpoint {path} holds a tensor of shape {tuple(contents.shape)} that stores fewer "
                "values: save it dense, and as .contiguous()"
            )


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def read_tensors(path: str | Path) -> dict[str, Any]:
    """Read a file of safetensors or `torch.save` that holds tensors only.

    Tensors are memory-mapped, except in the old format of `torch.save`, before PyTorch 1.6. The mapping is
    private: writing to a tensor leaves the file alone. Replace a file that may be loaded by
    renaming another onto it, since truncating it pulls the weights from under a model.

    Raises:
        ValueError: the file is missing, truncated, no checkpoint, or holds what would have to be executed.
    """
    path = local(path, "checkpoint")
    if not path.is_file():
        twin = path.with_suffix(".pt" if path.suffix == ".safetensors" else ".safetensors")
        cure = f"give {twin}, which does" if twin.is_file() else "give the path of a .safetensors or .pt file"
        raise ValueError(f"checkpoint {path} does not exist: {cure}")
    found = _format_of(path)
    if found != "safetensors":
        tensors: dict[str, Any] = _read_pt(path, found)
        _check_sizes(tensors, path)
        return tensors
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint {path} cannot be read, it may be truncated: fetch it again ({error})"
        ) from error


def read_state(path: str | Path) -> dict[str, Any]:
    """Read the state dict of a checkpoint of any trainer.

    `harmonica.io.state_dicts` finds it in the file.

    Raises:
        ValueError: the file is unreadable, or holds no state dict.
    """
    return find_state(read_tensors(path), f"checkpoint {path}")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)}" + ("" if value.is_floating_point() else f" {value.dtype}")


def check_state(
    wanted: Mapping[str, Tensor], state: Mapping[str, Any], source: str, *, optional: Collection[str] = ()
) -> None:
    """Check that a state dict has the wanted names and shapes; precision may differ.

    Raises:
        ValueError: it differs; the message names missing and surplus keys, or a layer and both shapes.
    """
    missing = [name for name in wanted if name not in state and name not in optional]
    surplus = [name for name in state if name not in wanted]
    wrong = [
        f"{name}, {_described(state[name])} where the model has {_described(value)}"
        for name, value in wanted.items()
        if name in state and _described(state[name]) != _described(value)
    ]
    kinds = (("lacks", missing), ("has the unknown", surplus), ("has another shape of", wrong))
    problems = [f"{problem} {_some(names)}" for problem, names in kinds if names]
    if problems:
        raise ValueError(
            f"{source} {'; it '.join(problems)}: it was made for another model than the configured one, "
            "change model.* or the path"
        )


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill `model` from a checkpoint in its own key layout, wrapped or not.

    The values are copied and half-precision ones widened to the model's precision; buffers may be
    missing. `harmonica.models.loading` maps instead of copying.

    Raises:
        ValueError: unreadable, made for another model (names the keys that differ), zero or not finite.
    """
    state, source = read_state(path), f"checkpoint {path}"
    buffers = {name for name, _ in model.named_buffers()}
    check_state(model.state_dict(), state, source, optional=buffers)
    check_values(state, source)
    model.load_state_dict(state, strict=False)


def read_released_router(path: str | Path) -> Tensor:
    """Read the logits (T, B) of a router checkpoint of the released training script."""
    contents = read_tensors(path)
    routers = contents.get("routers") if isinstance(contents, dict) else None
    if not routers:
        raise ValueError(f"checkpoint {path} has no `routers`: give a router of the released code")
    try:
        return torch.stack([routers[f"{i}.prob"] for i in range(len(routers))])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"checkpoint {path} lacks {error} or has it in another shape: give a router of the released code"
        ) from error
