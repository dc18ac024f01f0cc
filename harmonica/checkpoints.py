"""Weights from disk. Nothing here executes a pickle: safetensors, or `weights_only` loads."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


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
    """Contents of a `.safetensors` or `.pt` file; the latter memory-mapped, tensors only.

    Raises:
        ValueError: the file is missing, truncated, or holds what would have to be executed.
    """
    path = Path(path)
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


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill `model` from a checkpoint in its own key layout, with or without an `ema` wrapper.

    Half-precision weights are widened to the model's precision.

    Raises:
        ValueError: unreadable, or made for another model (names the first key that differs).
    """
    state = read_tensors(path)
    if isinstance(state, dict):
        state = state.get("ema", state)
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {path} holds no named tensors: give a state dict")
    own = model.state_dict()
    optional = {name for name, _ in model.named_buffers()}
    missing = sorted(own.keys() - state.keys() - optional)
    unknown = sorted(state.keys() - own.keys())
    shapes = {name: getattr(value, "shape", None) for name, value in state.items()}
    wrong = [name for name in own.keys() & state.keys() if own[name].shape != shapes[name]]
    for problem, names in (("lacks", missing), ("has the unknown", unknown), ("has another shape of", wrong)):
        if names:
            raise ValueError(
                f"checkpoint {path} {problem} {sorted(names)[0]}: it was made for another model "
                "than the configured one, change model.* or the path"
            )
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
