"""Weights from disk. Nothing here executes a pickle: safetensors, or `weights_only` loads."""

import argparse
import pickle
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from harmonica.paths import local

_NAMED = 5  # keys of each kind that an error names


def _read_pt(path: Path) -> Any:
    try:
        # Namespace: the released training script stores its arguments beside the tensors.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path} holds more than tensors and is refused: save its state dict as "
            f"safetensors ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"checkpoint {path} cannot be read, it may be truncated: fetch it again "
            f"({str(error).splitlines()[0]})"
        ) from error


def read_tensors(path: str | Path) -> dict[str, Any]:
    """Contents of a `.safetensors` file or a `.pt` (or `.bin`) one, memory-mapped, tensors only.

    The mapping is private: writing to a tensor leaves the file alone. Replace a file that may be
    loaded by renaming another onto it, since truncating it pulls the weights from under a model.

    Raises:
        ValueError: the file is missing, truncated, or holds what would have to be executed.
    """
    path = local(path, "checkpoint")
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist: give the path of a .safetensors or .pt file")
    if path.suffix != ".safetensors":
        return _read_pt(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint {path} cannot be read, it may be truncated: fetch it again ({error})"
        ) from error


def read_state(path: str | Path) -> dict[str, Any]:
    """The state dict of a checkpoint file, with or without an `ema` wrapper, memory-mapped.

    Raises:
        ValueError: unreadable, or no state dict.
    """
    state: Any = read_tensors(path)
    if isinstance(state, dict):
        state = state.get("ema", state)
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {path} holds no named tensors: give a state dict")
    return state


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
    """Refuse a state dict that is not of the wanted names and shapes; precision may differ.

    Raises:
        ValueError: names missing and surplus keys, and for a wrong shape the layer and both shapes.
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
    """Fill `model` from a checkpoint in its own key layout, with or without an `ema` wrapper.

    The values are copied and half-precision ones widened to the model's precision; buffers may be
    missing. `harmonica.models.loading` maps instead of copying.

    Raises:
        ValueError: unreadable, or made for another model (names the keys that differ).
    """
    state = read_state(path)
    buffers = {name for name, _ in model.named_buffers()}
    check_state(model.state_dict(), state, f"checkpoint {path}", optional=buffers)
    model.load_state_dict(state, strict=False)


def read_released_router(path: str | Path) -> Tensor:
    """Logits (T, B) of a router checkpoint as the released training script writes it."""
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
