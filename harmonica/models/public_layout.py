"""The public DiT checkpoints: a bare state dict whose keys are our own and whose shape must be inferred."""

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from harmonica.checkpoints import check_state, read_state
from harmonica.models.dit_config import HEADS_OF_WIDTH, DiTConfig
from harmonica.models.stored import POSITIONS, StoredModel, default_class_names, skeleton
from harmonica.tensor_files import write_tensors

_SHOWN = {
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
    POSITIONS: 3,
}  # what the shape is inferred from, with the number of dimensions


def infer_shape(state: dict[str, Tensor], source: str) -> DiTConfig:
    """Shape of a state dict in the public layout; the number of heads is the family's at that width.

    Raises:
        ValueError: not of this layout, or not enough in it to tell.
    """
    for name, dimensions in _SHOWN.items():
        if getattr(state.get(name), "ndim", None) != dimensions:
            raise ValueError(
                f"{source} is a bare checkpoint without a usable {name} and model.shape is not set: give its "
                "shape, or a checkpoint in the public DiT layout"
            )
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
        sample_size=math.isqrt(state[POSITIONS].shape[1]) * patch,
        patch_size=patch,
        in_channels=in_channels,
        out_channels=state["final_layer.linear.weight"].shape[0] // patch**2,
        num_layers=len(blocks),
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        num_embeds_ada_norm=state["y_embedder.embedding_table.weight"].shape[0] - 1,
    )


def read_public(
    path: Path, shape: DiTConfig | None, class_names: tuple[str, ...] | None = None
) -> StoredModel:
    """A checkpoint file under our own names, of a given shape or of the one it shows.

    Raises:
        ValueError: unreadable, or its tensors are not those of the shape.
    """
    state = read_state(path)
    config = shape or infer_shape(state, f"model.path {path}")
    check_state(skeleton(config).state_dict(), state, f"checkpoint {path}", optional=(POSITIONS,))
    tensors: dict[str, tuple[Tensor, ...]] = {name: (value,) for name, value in state.items()}
    return StoredModel(config=config, tensors=tensors, class_names=class_names or default_class_names(config))


def write_public(path: Path, stored: StoredModel) -> None:
    """One file in the public layout, in the stored precision: `.safetensors`, else `.pt`, without wrapper."""
    state = {name: stored.tensor(name) for name in stored.tensors}
    precision = next(iter(state.values())).dtype
    state.setdefault(POSITIONS, stored.positions().to(precision))
    if path.suffix == ".safetensors":
        write_tensors(state, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)
