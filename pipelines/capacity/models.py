"""Load the models that capacity is computed for, by name or folder.

MACs are the model's own (`BranchedTransformer.macs`), on `torch.device("meta")` for a public model.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harmonica.integrations.recorded.kinds import BLOCKS, are_all_blocks
from harmonica.io.weight_files import read_json
from harmonica.models.base import BranchedTransformer
from harmonica.models.diffusers_folder import find_transformer
from harmonica.models.loading import ModelConfig, load_model
from harmonica.models.public_shapes import dit_skeleton, pixart_skeleton
from harmonica.models.vae import draws_pixels
from harmonica.training.memory_estimates import loaded_shape
from harmonica.validation.settings import SettingError, require

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


_RECORDED: dict[str, Callable[[str, Size, Mapping[str, Any], Sequence[str]], SizedModel]] = {
    "FluxTransformer2DModel": flux,
    "WanTransformer3DModel": wan,
}
_USUAL = {
    "FluxTransformer2DModel": Size(height=1024, width=1024),
    "WanTransformer3DModel": Size(height=480, width=832, frames=81),
}
FAMILIES = {
    "dit-xl-2": _Family(Size(height=256, width=256), _dit),
    "pixart-alpha": _Family(Size(height=1024, width=1024), _pixart(120)),
    "pixart-sigma": _Family(Size(height=2048, width=2048), _pixart(300)),
}
"""The public models that have branch files, by name."""
RECORDED_FAMILIES = {"flux": "FluxTransformer2DModel", "wan-14b": "WanTransformer3DModel"}
"""The classes of the public models whose branches are recorded, by the model's name."""


def sized_model(name: str, asked: Size, cacheable: Sequence[str] = (BLOCKS,)) -> SizedModel:
    """Return the sizes of a public model, or of a model folder.

    Args:
        asked: zeros are the model's usual.
        cacheable: what is a branch, where branches are recorded.

    Raises:
        ValueError: no such model or folder, or a resolution or kind of branch that the model cannot have.
    """
    folder, config = Path(name), dict[str, Any]()
    kind = RECORDED_FAMILIES.get(name, "")
    if name not in FAMILIES and not kind:
        if not folder.exists():
            names = ", ".join((*FAMILIES, *RECORDED_FAMILIES))
            raise SettingError(f"model is {name!r}: give one of {names}, or a model folder")
        transformer = find_transformer(folder) if folder.is_dir() else None
        config = read_json(transformer / "config.json") if transformer else {}
        kind, name = config.get("_class_name", ""), folder.name
    if kind in _RECORDED:
        return _RECORDED[kind](name, _filled(asked, _USUAL[kind]), config, cacheable)
    require(
        are_all_blocks(cacheable),
        "cacheable",
        cacheable,
        f"leave it out for this model, which is none of {', '.join(RECORDED_FAMILIES)}",
    )
    if name in FAMILIES:
        family = FAMILIES[name]
        return family.make(name, _filled(asked, family.usual))
    model = load_model(ModelConfig(path=str(folder))).model
    side = model.sample_size * (1 if draws_pixels(model) else 8)
    own = Size(height=side, width=side)
    if _filled(asked, own) != own:
        raise SettingError(f"height is {asked.height}: give 0, the model in {folder} has {own} pixels")
    return _branched(name, model, own)


def _filled(asked: Size, usual: Size) -> Size:
    changes = {name: value for name, value in dataclasses.asdict(asked).items() if value}
    return dataclasses.replace(usual, **changes)
