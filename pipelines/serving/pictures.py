"""Decode the files of pictures to edit."""

import io
import warnings

from PIL import Image, ImageOps

from .image_request import Picture

_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 2**24


class TooLarge(ValueError):
    """A picture has more pixels than are decoded."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__(f"{width}x{height} pixels: give at most {MAX_PIXELS} in all")


def decode(file: bytes) -> Image.Image:
    """Decode a png, jpeg or webp file, upright and in RGB.

    What is transparent is white.

    Raises:
        TooLarge: it has too many pixels; found out before any is decoded.
        Exception: it cannot be decoded; Pillow's decoders raise errors of many kinds for damaged files.
    """
    with warnings.catch_warnings(), Image.open(io.BytesIO(file), formats=_FORMATS) as opened:
        warnings.simplefilter("ignore")
        width, height = opened.size  # from the header alone
        if width * height > MAX_PIXELS:
            raise TooLarge(width, height)
        upright = ImageOps.exif_transpose(opened).convert("RGBA")
    paper = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(paper, upright).convert("RGB")


def plain_picture(width: int, height: int, grey: int = 128) -> Picture:
    """Return a picture of one grey."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (grey, grey, grey)).save(file, "PNG")
    return Picture(width, height, file.getvalue())
