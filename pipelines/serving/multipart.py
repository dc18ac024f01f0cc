"""Parse bodies of type multipart/form-data (RFC 7578).

A middleware has read them whole and bounded them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from email.errors import HeaderParseError
from email.message import EmailMessage
from email.parser import BytesHeaderParser
from email.policy import HTTP

from .http_errors import ApiError

_MAX_PARTS = 64
_MAX_HEADER_BYTES = 4096
_MAX_BOUNDARY = 70  # RFC 2046


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
    delimiter = b"\r\n--" + _boundary(content_type)
    # The first delimiter may begin the body; what is before it and after the last is to be ignored.
    _, *parts = (b"\r\n" + body).split(delimiter, _MAX_PARTS + 1)
    if len(parts) > _MAX_PARTS:
        raise _malformed(f"it has more than {_MAX_PARTS} parts")
    return list(_named(parts))


def _boundary(content_type: str) -> bytes:
    message = EmailMessage(HTTP)
    try:
        message["content-type"] = content_type
        boundary = str(message["content-type"].params.get("boundary", ""))
    except (HeaderParseError, ValueError, IndexError, AttributeError):
        boundary = ""
    if message.get_content_type() != "multipart/form-data":
        text = "the body is no form: send one, with Content-Type: multipart/form-data"
        raise ApiError(400, text, None, "invalid_multipart")
    if not (0 < len(boundary) <= _MAX_BOUNDARY and boundary.isascii()):
        raise _malformed("its Content-Type names no boundary")
    return boundary.encode()


def _named(parts: list[bytes]) -> Iterator[Part]:
    for part in parts:
        if part.startswith(b"--"):
            return
        head, separator, value = part.partition(b"\r\n\r\n")
        if not separator or len(head) > _MAX_HEADER_BYTES or not head.startswith(b"\r\n"):
            raise _malformed("a part has no headers")
        try:
            found = BytesHeaderParser(policy=HTTP).parsebytes(head[2:] + b"\r\n\r\n")["content-disposition"]
            parameters = dict(found.params)
        except (HeaderParseError, ValueError, IndexError, AttributeError):
            parameters = {}
        name = parameters.get("name")
        if not name:
            raise _malformed("a part has no name in its Content-Disposition")
        yield Part(str(name), value, "filename" in parameters)
    raise _malformed("its last boundary is missing")


def _malformed(why: str) -> ApiError:
    return ApiError(400, f"the body is not multipart/form-data: {why}", None, "invalid_multipart")
