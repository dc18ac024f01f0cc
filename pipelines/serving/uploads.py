"""Read requests that edit pictures, as OpenAI's client sends them.

They are forms of type multipart/form-data.
"""

import io
import re
import warnings
from collections.abc import Sequence

from fastapi.exceptions import RequestValidationError
from PIL import Image, ImageOps
from pydantic import ValidationError

from .api_requests import EditRequest, LenientEditRequest
from .http_errors import ApiError
from .image_request import Picture
from .multipart import Part, parse_parts

_FORMATS = ("PNG", "JPEG", "WEBP")
_MAX_PICTURE_PIXELS = 2**24
_PICTURES = re.compile(r"image(\[\d*\])?", re.ASCII)
_NOT_FOLLOWED = ("mask", "markup")


def read_form(content_type: str, body: bytes, *, lenient: bool) -> tuple[EditRequest, list[Part]]:
    """Return a form's fields and the files of its pictures.

    Args:
        content_type: the request's header.
        lenient: keep fields that are not followed, so that the answer can warn of them.

    Raises:
        ApiError: the body is no form, or has a field twice, or no picture.
        RequestValidationError: a field has a value that cannot be used.
    """
    fields: dict[str, str] = {}
    pictures: list[Part] = []
    for part in parse_parts(content_type, body):
        if _PICTURES.fullmatch(part.name):
            pictures.append(part)
        elif part.name in _NOT_FOLLOWED and not lenient:
            message = f"{part.name} is set and this endpoint edits whole pictures: leave it out"
            raise ApiError(400, message, part.name, "invalid_value")
        elif part.name in fields:
            name = part.name[:100]
            raise ApiError(400, f"{name} is there twice: send it once", name, "invalid_value")
        else:
            fields[part.name] = "" if part.is_file else part.text()
    try:
        form = (LenientEditRequest if lenient else EditRequest).model_validate(fields)
    except ValidationError as error:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
        raise RequestValidationError(errors) from None
    if not pictures:
        raise ApiError(400, "image is missing", "image", "missing_required_parameter")
    return form, pictures


def decode_pictures(parts: Sequence[Part]) -> tuple[Picture, ...]:
    """Decode the pictures of a form; call it from a thread, since it takes long.

    Raises:
        ApiError: one is no picture of a known format, or too large.
    """
    return tuple(_decode(part.value) for part in parts)


def _decode(data: bytes) -> Picture:
    kinds = "a png, jpeg or webp file"
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            warnings.simplefilter("ignore")
            width, height = opened.size  # from the header alone
            if width * height > _MAX_PICTURE_PIXELS:
                message = f"image has {width}x{height} pixels: give at most {_MAX_PICTURE_PIXELS} in all"
                raise ApiError(400, message, "image", "image_too_large")
            upright = ImageOps.exif_transpose(opened).convert("RGBA")
    except ApiError:
        raise
    except Exception:  # Pillow's decoders raise errors of many kinds for damaged files
        message = f"image cannot be decoded: give {kinds}"
        raise ApiError(400, message, "image", "invalid_image") from None
    paper = Image.new("RGBA", upright.size, "white")
    flat = Image.alpha_composite(paper, upright).convert("RGB")
    return Picture(flat.width, flat.height, flat.tobytes())
