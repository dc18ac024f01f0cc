"""Names of requests: the client's X-Request-Id where it is a good one, else a new one.

Imported by Serve's proxies too, which have no torch: this file has to stay light.
"""

import re
import uuid
from collections.abc import Iterable

HEADER = b"x-request-id"
_GOOD = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
Headers = list[tuple[bytes, bytes]]


def with_request_id(headers: Iterable[tuple[bytes, bytes]]) -> tuple[Headers, bytes]:
    """Headers of a request with exactly one X-Request-Id, and its value.

    A value that is too long, or has characters that logs, HTML or JSON would have to escape, is replaced.
    """
    kept: Headers = []
    given: list[bytes] = []
    for name, value in headers:
        if name.lower() == HEADER:
            given.append(value)
        else:
            kept.append((name, value))
    is_good = len(given) == 1 and _GOOD.fullmatch(given[0])
    request_id = given[0] if is_good else uuid.uuid4().hex.encode()
    return [*kept, (HEADER, request_id)], request_id
