"""A model from a folder or a checkpoint file.

A folder holds `config.json` (shape under diffusers' names, class names) and `model.safetensors`;
a `.pt` or `.safetensors` file in the public DiT key layout comes with a configured shape.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from harmonica.builtin import FASHION_DIT
from harmonica.checkpoints import load_weights
from harmonica.models.dit import DiT, DiTConfig
from harmonica.sdt import freeze

BUILTIN = "builtin:fashion-dit"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which denoiser."""

    path: str = BUILTIN
    """`builtin:fashion-dit`, a folder with config.json and model.safetensors, or a public DiT .pt file."""
    shape: DiTConfig | None = None
    """Shape of a bare checkpoint file; a folder brings its own."""


@dataclass(frozen=True)
class LoadedModel:
    """A frozen model and what its classes are called."""

    model: DiT
    class_names: tuple[str, ...]


def read_folder_config(folder: Path) -> tuple[DiTConfig, tuple[str, ...]]:
    """Shape and class names of a model folder."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        shape = DiTConfig(**config["shape"])
        names = tuple(config.get("class_names", ()))
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"model.path {folder} has no usable config.json ({error}): give a folder with config.json and "
            "model.safetensors, or a .pt file with model.shape"
        ) from error
    return shape, names or tuple(map(str, range(shape.num_embeds_ada_norm)))


def write_folder_config(
    folder: Path, shape: DiTConfig, class_names: tuple[str, ...], **extra: object
) -> None:
    """The `config.json` that `read_folder_config` reads."""
    config = {"shape": dataclasses.asdict(shape), "class_names": list(class_names), **extra}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_model(config: ModelConfig) -> LoadedModel:
    """The configured denoiser, frozen, float32, on the CPU.

    Raises:
        ValueError: missing, truncated, or another shape than configured.
    """
    path = FASHION_DIT if config.path == BUILTIN else Path(config.path)
    if path.is_dir():
        shape, names = read_folder_config(path)
        weights = path / "model.safetensors"
    elif path.is_file():
        if config.shape is None:
            raise ValueError(
                f"model.path {path} is a bare checkpoint and model.shape is not set: give its shape"
            )
        shape, weights = config.shape, path
        names = tuple(map(str, range(shape.num_embeds_ada_norm)))
    else:
        raise ValueError(
            f"model.path {config.path} does not exist: give {BUILTIN}, a model folder, or a .pt file"
        )
    model = DiT(shape)
    load_weights(model, weights)
    freeze(model)
    return LoadedModel(model, names)
