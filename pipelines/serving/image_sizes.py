"""The sizes of images that a model leaves to a request."""

import re
from dataclasses import dataclass
from typing import NoReturn

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
