"""Reading of PixArt-alpha and -Sigma from diffusers folders."""

from pathlib import Path

from harmonica.models.diffusers_folder import PipelineParts
from harmonica.models.pixart.model import PixArt
from harmonica.models.text_blocks import Kind
from harmonica.models.text_checkpoint import StoredTextTransformer

CLASS_NAME = "PixArtTransformer2DModel"
_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Padded length of a prompt in diffusers' pipelines."""


def read_pixart(folder: Path, *, cacheable: tuple[Kind, ...], text_tokens: int = 0) -> StoredTextTransformer:
    """Read the folder of a PixArt pipeline or of its transformer.

    Args:
        text_tokens: padded length of a prompt; 0 takes the pipeline's.

    Raises:
        ValueError: unreadable, or a length that nothing tells.
    """
    parts = PipelineParts.read(folder)
    tokens = text_tokens or _TOKENS.get(parts.class_name, 0)
    if not tokens:
        raise ValueError(
            f"model.text_tokens is 0 and {folder} does not say which pipeline it belongs to: give the padded "
            "length of a prompt, 120 for PixArt-alpha and 300 for PixArt-Sigma"
        )
    return StoredTextTransformer.read(folder, parts, PixArt, text_tokens=tokens, cacheable=cacheable)
