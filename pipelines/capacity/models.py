"""Load the models that capacity is computed for, by name or folder.

MACs are the model's own (`BranchedTransformer.macs`), on `torch.device("meta")` for a public model.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harmonica.io.weight_files import read_json
from harmonica.models.base import BranchedTransformer
from harmonica.models.diffusers_folder import find_transformer
from harmonica.models.loading import ModelConfig, load_model
from harmonica.models.public_shapes import dit_skeleton, pixart_skeleton
from harmonica.models.vae import draws_pixels
from harmonica.training.memory_estimates import loaded_shape
from harmonica.validation.settings import SettingError

from .recorded_models import flux, wan
from .sizes import Size, SizedModel, prompt_bytes


def _branched(name: str, model: BranchedTransformer, size: Size) -> SizedModel:
    noise = 4 * model.in_channels * model.sample_size**2
    prompt = 0
    if not model.num_classes:
        width, tokens = model.text_shape()
        prompt = prompt_bytes(tokens, width)
    return SizedModel(
        name=name,
        size=size,
        macs=model.macs(),
        shapes=(loaded_shape(model, torch.bfloat16),),
        num_steps=20,
        is_guided=True,
        sample_bytes=noise + prompt,
    )


@dataclass(frozen=True, slots=True)
class _Family:
    """A public model at any resolution."""

    usual: Size
    make: Callable[[str, Size], SizedModel]


def _dit(name: str, size: Size) -> SizedModel:
    return _branched(name, dit_skeleton(size.square), size)


def _pixart(text_tokens: int) -> Callable[[str, Size], SizedModel]:
    def make(name: str, size: Size) -> SizedModel:
        unit = 16
        if size.square % unit:
            raise SettingError(f"height is {size.height}: give a multiple of {unit} for this model")
        return _branched(name, pixart_skeleton(size.square, text_tokens), size)

    return make


_RECORDED: dict[str, Callable[[str, Size, Mapping[str, Any]], SizedModel]] = {
    "FluxTransformer2DModel": flux,
    "WanTransformer3DModel": wan,
}
_USUAL_FLUX, _USUAL_WAN = Size(height=1024, width=1024), Size(height=480, width=832, frames=81)
FAMILIES = {
    "dit-xl-2": _Family(Size(height=256, width=256), _dit),
    "pixart-alpha": _Family(Size(height=1024, width=1024), _pixart(120)),
    "pixart-sigma": _Family(Size(height=2048, width=2048), _pixart(300)),
    "flux": _Family(_USUAL_FLUX, lambda name, size: flux(name, size, {})),
    "wan-14b": _Family(_USUAL_WAN, lambda name, size: wan(name, size, {})),
}
"""The public models, by name."""


def sized_model(name: str, asked: Size) -> SizedModel:
    """Return the sizes of a public model, or of a model folder.

    Args:
        asked: zeros are the model's usual.

    Raises:
        ValueError: no such model or folder, or a resolution that the model cannot have.
    """
    if name in FAMILIES:
        family = FAMILIES[name]
        return family.make(name, _filled(asked, family.usual))
    folder = Path(name)
    if not folder.exists():
        raise SettingError(f"model is {name!r}: give one of {', '.join(FAMILIES)}, or a model folder")
    transformer = find_transformer(folder) if folder.is_dir() else None
    config = read_json(transformer / "config.json") if transformer else {}
    if (kind := config.get("_class_name")) in _RECORDED:
        usual = _USUAL_WAN if kind.startswith("Wan") else _USUAL_FLUX
        return _RECORDED[kind](folder.name, _filled(asked, usual), config)
    model = load_model(ModelConfig(path=name)).model
    side = model.sample_size * (1 if draws_pixels(model) else 8)
    own = Size(height=side, width=side)
    if _filled(asked, own) != own:
        raise SettingError(f"height is {asked.height}: give 0, the model in {name} has {own} pixels")
    return _branched(folder.name, model, own)


def _filled(asked: Size, usual: Size) -> Size:
    changes = {name: value for name, value in dataclasses.asdict(asked).items() if value}
    return dataclasses.replace(usual, **changes)
