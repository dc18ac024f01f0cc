"""The sizes of a model that capacity follows from."""

from dataclasses import dataclass

from harmonica.models.base import Macs
from harmonica.training.memory_model import Shape
from harmonica.validation.settings import SettingError

_T5_WIDTH = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Height and width in pixels, and frames; 0 is the model's usual."""

    height: int = 0
    width: int = 0
    frames: int = 0

    @property
    def square(self) -> int:
        """Return the side of a square image.

        Raises:
            SettingError: the size is none of a square image.
        """
        if self.height != self.width:
            raise SettingError(f"width is {self.width}: give that of height ({self.height}) for this model")
        if self.frames > 1:
            raise SettingError(f"frames is {self.frames}: give 0, this model draws images")
        return self.height

    def __str__(self) -> str:
        still = f"{self.height} x {self.width}"
        return f"{still}, {self.frames} frames" if self.frames > 1 else still


@dataclass(frozen=True, kw_only=True, slots=True)
class SizedModel:
    """Sizes of a model in bfloat16 at one resolution."""

    name: str
    size: Size
    macs: Macs
    shapes: tuple[Shape, ...]
    """Shapes of its kinds of blocks, one after another; the first has all the weights."""
    num_steps: int
    """Usual number of sampling steps T."""
    is_guided: bool
    """Whether an image is two rows."""
    sample_bytes: int
    """Bytes of a training sample: its noise in float32 and its prompt's embeddings."""
    is_recorded: bool = False
    """Whether its branches are recorded in a pipeline."""
    sub_layers: int = 0
    """Sub-layers that a forward runs, each of which takes a fixed time; 0 counts the branches."""

    @property
    def rows(self) -> int:
        """Return the model rows of one image."""
        return 1 + self.is_guided

    @property
    def num_branches(self) -> int:
        """Return B."""
        return len(self.macs.branches)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the weights on an unsharded process."""
        return sum(shape.weights() for shape in self.shapes)

    @property
    def output_bytes(self) -> int:
        """Return the bytes of an image or a video without compression."""
        return 3 * self.size.height * self.size.width * max(1, self.size.frames)


def prompt_bytes(tokens: int, width: int = _T5_WIDTH) -> int:
    """Return the bytes of a stored prompt in bfloat16, with its mask.

    It is padded; see `PromptStore.row_bytes`.
    """
    return tokens * (2 * width + 1)
