"""Public DiT checkpoints: bare state dicts, from which the shape is inferred."""

import logging
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from harmonica.io.safe_load import check_state, read_state
from harmonica.io.tensor_files import write_tensors
from harmonica.models.dit.config import HEADS_OF_WIDTH, DiTConfig
from harmonica.models.dit.stored import POSITIONS, StoredModel, default_class_names, skeleton

logger = logging.getLogger(__name__)

_SHOWN = {
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
}  # what the shape is inferred from, with the number of dimensions
_DEFAULT_SIZE = DiTConfig().sample_size
"""Size of the public code's latents (256 x 256 pixels), if neither file nor setting gives one."""
_NAMED = 3  # keys that an error names


def infer_shape(state: dict[str, Tensor], source: str) -> DiTConfig:
    """Infer the shape of a state dict in the public layout.

    The number of heads is that of the public model of this width. The image size is inferred from the
    positions; if a checkpoint lacks them, it is the public code's default, with a warning.

    Raises:
        ValueError: not of this layout, or not enough in it to tell.
    """
    if wrong := [name for name, ndim in _SHOWN.items() if getattr(state.get(name), "ndim", None) != ndim]:
        raise ValueError(f"{source} {_what_it_is(state, wrong[0])}")
    width, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
    if width not in HEADS_OF_WIDTH:
        known = ", ".join(map(str, HEADS_OF_WIDTH))
        raise ValueError(
            f"{source} is a bare checkpoint of width {width} and model.shape is not set: give its shape, the "
            f"number of heads is known for the public widths alone ({known})"
        )
    blocks = {found[1] for name in state if (found := re.match(r"blocks\.(\d+)\.", name))}
    heads = HEADS_OF_WIDTH[width]
    return DiTConfig(
        sample_size=_sample_size(state.get(POSITIONS), patch, source),
        patch_size=patch,
        in_channels=in_channels,
        out_channels=state["final_layer.linear.weight"].shape[0] // patch**2,
        num_layers=len(blocks),
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        num_embeds_ada_norm=state["y_embedder.embedding_table.weight"].shape[0] - 1,
    )


def _sample_size(positions: Tensor | None, patch: int, source: str) -> int:
    if positions is None:
        logger.warning(
            "%s has no %s, which alone tells the image size: %d is taken, give model.shape for another",
            source,
            POSITIONS,
            _DEFAULT_SIZE,
        )
        return _DEFAULT_SIZE
    if positions.ndim != 3:
        raise ValueError(
            f"{source} has a {POSITIONS} of shape {tuple(positions.shape)}: give (1, tokens, width), or none"
        )
    return math.isqrt(positions.shape[1]) * patch


def _what_it_is(state: dict[str, Tensor], missing: str) -> str:
    """Return why a state dict is not in the public layout, and what to do."""
    if any(name.startswith("transformer_blocks.") for name in state):
        return (
            "has the names of a diffusers module, whose shape is in its config.json: give the folder of both"
        )
    held = ", ".join(list(state)[:_NAMED])
    more = f" and {len(state) - _NAMED} more" if len(state) > _NAMED else ""
    found = state.get(missing)
    lack = f"no {missing}" if found is None else f"a {missing} of shape {tuple(getattr(found, 'shape', ()))}"
    return f"has {lack}, but {held}{more}: it is no DiT in the public layout, give a checkpoint of one"


def read_public(
    path: Path, shape: DiTConfig | None, class_names: tuple[str, ...] | None = None
) -> StoredModel:
    """Read a checkpoint file, of a given shape or of the one inferred from it.

    Raises:
        ValueError: unreadable, or its tensors are not those of the shape.
    """
    state, source = read_state(path), f"checkpoint {path}"
    config = shape or infer_shape(state, f"model.path {path}")
    check_state(skeleton(config).state_dict(), state, source, optional=(POSITIONS,))
    tensors: dict[str, tuple[Tensor, ...]] = {name: (value,) for name, value in state.items()}
    return StoredModel(
        config=config,
        tensors=tensors,
        class_names=class_names or default_class_names(config),
        source=source,
    )


def write_public(path: Path, stored: StoredModel) -> None:
    """Write one file in the public layout, `.safetensors` or `.pt`, without wrapper."""
    state = {name: stored.tensor(name) for name in stored.tensors}
    precision = next(iter(state.values())).dtype
    state.setdefault(POSITIONS, stored.positions().to(precision))
    if path.suffix == ".safetensors":
        write_tensors(state, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)
