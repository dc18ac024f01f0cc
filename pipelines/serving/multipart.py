"""Parse bodies of type multipart/form-data (RFC 7578) by Werkzeug's decoder.

A middleware has read them whole and bounded them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Epilogue, Event, Field, File, MultipartDecoder, NeedData, State

from .http_errors import ApiError

_MAX_PARTS = 64
_MAX_HEADER_BYTES = 4096
_MAX_BOUNDARY = 70  # RFC 2046
_CHUNK_BYTES = 2**16
"""Bytes that the decoder gets at a time, so that it meets no long headers."""
_LONG_HEADERS = f"a part has more than {_MAX_HEADER_BYTES} bytes of headers"


@dataclass(frozen=True, slots=True)
class Part:
    """A part has the name of a form's field, and its value."""

    name: str
    value: bytes = field(repr=False)
    is_file: bool

    def text(self) -> str:
        """Return the value of a field that is text.

        Raises:
            ApiError: it is not UTF-8.
        """
        try:
            return self.value.decode()
        except UnicodeDecodeError:
            message = f"{self.name[:100]} is not UTF-8: send text"
            raise ApiError(400, message, self.name[:100], "invalid_value") from None


def parse_parts(content_type: str, body: bytes) -> list[Part]:
    """Return the parts of a body.

    Args:
        content_type: the request's header, which names the boundary.

    Raises:
        ApiError: the body is of another type, or is not whole.
    """
    parts: list[Part] = []
    head: Field | File | None = None
    value = bytearray()
    for event in _events(_boundary(content_type), body):
        if isinstance(event, (Field, File)):
            if sum(len(name) + len(each) for name, each in event.headers) > _MAX_HEADER_BYTES:
                raise _malformed(_LONG_HEADERS)
            if not event.name:
                raise _malformed("a part has no name in its Content-Disposition")
            head, value = event, bytearray()
        elif isinstance(event, Data) and head is not None:
            value += event.data
            if not event.more_data:
                parts.append(Part(head.name, bytes(value), isinstance(head, File)))
    return parts


def _boundary(content_type: str) -> bytes:
    kind, parameters = parse_options_header(content_type)
    boundary = parameters.get("boundary", "")
    if kind.lower() != "multipart/form-data":
        text = "the body is no form: send one, with Content-Type: multipart/form-data"
        raise ApiError(400, text, None, "invalid_multipart")
    if not (0 < len(boundary) <= _MAX_BOUNDARY and boundary.isascii()):
        raise _malformed("its Content-Type names no boundary")
    return boundary.encode()


def _events(boundary: bytes, body: bytes) -> Iterator[Event]:
    """Yield what the decoder finds, up to what follows the last boundary."""
    decoder = MultipartDecoder(boundary, max_parts=_MAX_PARTS)
    chunks = (body[first : first + _CHUNK_BYTES] for first in range(0, len(body), _CHUNK_BYTES))
    while True:
        try:
            event = decoder.next_event()
        except RequestEntityTooLarge:
            raise _malformed(f"it has more than {_MAX_PARTS} parts") from None
        except ValueError:
            if decoder.state is not State.PART:
                raise _malformed("its last boundary is missing") from None
            # It has taken headers off its buffer, up to the blank line, before it looks at them.
            has_headers = decoder.buffer.startswith(b"\r\n")
            missing = "name in its Content-Disposition" if has_headers else "headers"
            raise _malformed(f"a part has no {missing}") from None
        if isinstance(event, Epilogue):
            return
        if isinstance(event, NeedData):
            if decoder.state is State.PART and len(decoder.buffer) > _MAX_HEADER_BYTES:
                raise _malformed(_LONG_HEADERS)
            decoder.receive_data(next(chunks, None))
        else:
            yield event


def _malformed(why: str) -> ApiError:
    return ApiError(400, f"the body is not multipart/form-data: {why}", None, "invalid_multipart")
