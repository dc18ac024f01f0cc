"""Read requests that edit pictures, as OpenAI's client sends them.

They are forms of type multipart/form-data.
"""

import asyncio
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from .api_requests import EditRequest, LenientEditRequest
from .http_errors import ApiError
from .image_request import Picture
from .multipart import Part, parse_parts
from .pictures import TooLarge, decode

_PICTURES = re.compile(r"image(\[\d*\])?", re.ASCII)
_NOT_FOLLOWED = ("mask", "markup")


@lru_cache(maxsize=1)
def _decoders() -> ThreadPoolExecutor:
    """Return the threads that decode.

    They are few, since each takes some 300 MB for the largest picture, however small its file is.
    """
    return ThreadPoolExecutor(2, thread_name_prefix="decoder")


def refuse_other_sites(request: Request, allowed: Sequence[str]) -> None:
    """Refuse a form that a page of another site sends.

    A browser asks before it sends JSON elsewhere, but not before it sends a form: any page could have an
    endpoint draw that its reader can reach and that wants no key.

    Args:
        allowed: sites that may, as in `serve.cors_origins`.

    Raises:
        ApiError: it is of another site.
    """
    origin = request.headers.get("origin", "")
    is_own = not origin or urlsplit(origin).netloc == request.headers.get("host")
    if not (is_own or "*" in allowed or origin in allowed):
        message = "a page of another site has sent this form: name the site in serve.cors_origins"
        raise ApiError(403, message, None, "other_site")


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


async def decode_pictures(parts: Sequence[Part]) -> tuple[Picture, ...]:
    """Decode the pictures of a form once, in a thread.

    Those that cannot be edited are refused so before they wait.

    Raises:
        ApiError: one is no picture of a known format, or too large.
    """
    loop = asyncio.get_running_loop()
    return tuple([await loop.run_in_executor(_decoders(), _checked, part.value) for part in parts])


def _checked(file: bytes) -> Picture:
    try:
        decoded = decode(file)
    except TooLarge as error:
        raise ApiError(400, f"image has {error}", "image", "image_too_large") from None
    except Exception:
        message = "image cannot be decoded: give a png, jpeg or webp file"
        raise ApiError(400, message, "image", "invalid_image") from None
    return Picture(decoded.width, decoded.height, file)
