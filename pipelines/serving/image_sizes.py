"""The sizes of images that a model leaves to a request."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from .image_request import SettingRejected

_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)
_MAX_ECHO = 100


@dataclass(frozen=True, slots=True)
class SizeBounds:
    """Sizes are multiples of a number of pixels, up to an area."""

    default: tuple[int, int]
    """Width and height."""
    multiple: int
    max_pixels: int
    """Largest width times height."""
    max_side: int
    """Largest width, and largest height."""

    def parse(self, text: str) -> tuple[int, int]:
        """Return the width and height that a request's `size` names.

        Raises:
            SettingRejected: it is no size, or out of bounds.
        """
        found = _SIZE.fullmatch(text)
        if found is None:
            self._refuse(text, f"give WIDTHxHEIGHT, such as {as_text(self.default)}, or 'auto'")
        width, height = int(found[1]), int(found[2])
        if width % self.multiple or height % self.multiple:
            near = as_text((self._rounded(width), self._rounded(height)))
            self._refuse(text, f"give multiples of {self.multiple}, such as {near}")
        if max(width, height) > self.max_side:
            self._refuse(text, f"give sides up to {self.max_side}")
        if width * height > self.max_pixels:
            self._refuse(text, f"give width times height up to {self.max_pixels}")
        return width, height

    def _refuse(self, text: str, cure: str) -> NoReturn:
        raise SettingRejected("size", f"size is {text[:_MAX_ECHO]!r}: {cure}")

    def _rounded(self, pixels: float) -> int:
        return max(1, round(pixels / self.multiple)) * self.multiple

    def like(self, width: int, height: int) -> tuple[int, int]:
        """Return the size of this aspect ratio whose area is about the default's."""
        area = self.default[0] * self.default[1]
        most = self.max_side // self.multiple * self.multiple
        wide = min(self._rounded((area * width / height) ** 0.5), most)
        high = min(self._rounded((area * height / width) ** 0.5), most)
        return wide, high


def as_text(size: tuple[int, int]) -> str:
    """Return a size as a request's `size` names it."""
    return f"{size[0]}x{size[1]}"


def pipeline_bounds(
    pipe: Any, defaults: Mapping[str, Any], arguments: Mapping[str, Any], max_pixels: int
) -> SizeBounds:
    """Return the sizes that a diffusers pipeline makes.

    Args:
        defaults: values of its call's arguments where none are given.
        arguments: those of every call, whose size is the default one.
        max_pixels: largest area; the default size is always allowed.
    """
    transformer = pipe.transformer.config
    factor = int(getattr(pipe, "vae_scale_factor", 8))
    patch = transformer.get("patch_size") or 1
    patch = max(patch) if isinstance(patch, (tuple, list)) else int(patch)
    # Two latents a side become one token, by patches or by packing.
    multiple = factor * max(2, patch)
    own = getattr(pipe, "default_sample_size", None) or transformer.get("sample_size")
    side = defaults["height"] or (int(own) * factor if isinstance(own, int) else 1024)
    sides = [arguments.get(name) or side for name in ("width", "height")]
    width, height = (max(1, each // multiple) * multiple for each in sides)
    table = transformer.get("pos_embed_max_size")
    max_side = table * patch * factor if table else max(16 * max(width, height), 4096)
    return SizeBounds((width, height), multiple, max(max_pixels, width * height), max_side)
