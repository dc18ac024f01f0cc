"""Name each request: by the client's X-Request-Id if that is valid, else anew.

Serve's proxies import this file too, and must not load torch.
"""

import re
import uuid
from collections.abc import Iterable

HEADER = b"x-request-id"
_GOOD = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
Headers = list[tuple[bytes, bytes]]


def with_request_id(headers: Iterable[tuple[bytes, bytes]]) -> tuple[Headers, bytes]:
    """Return a request's headers with exactly one X-Request-Id, and its value.

    A new value replaces one that is longer than 128 characters, or has characters that logs, HTML or JSON
    would have to escape, and several values.
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
