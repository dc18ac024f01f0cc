"""Reading of Sana from diffusers folders."""

from pathlib import Path

from harmonica.models.diffusers_folder import PipelineParts
from harmonica.models.sana.model import TEXT_TOKENS, Sana
from harmonica.models.text_blocks import Kind
from harmonica.models.text_checkpoint import StoredTextTransformer

CLASS_NAME = "SanaTransformer2DModel"


def read_sana(folder: Path, *, cacheable: tuple[Kind, ...], text_tokens: int = 0) -> StoredTextTransformer:
    """Read the folder of a Sana pipeline or of its transformer.

    Args:
        text_tokens: padded length of a prompt; 0 takes the pipeline's.

    Raises:
        ValueError: no usable config.json or weights.
    """
    tokens = text_tokens or TEXT_TOKENS
    return StoredTextTransformer.read(
        folder, PipelineParts.read(folder), Sana, text_tokens=tokens, cacheable=cacheable
    )
