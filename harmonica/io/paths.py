"""The resolution of paths and URIs for all settings, commands and functions.

A path is local (absolute, relative, with `~`, or a file:// URI) or lies in an object store (s3://, gs://).
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

_PUBLIC_QUERY = ("endpoint_override", "region", "scheme")  # the rest of a query may hold credentials
_STORES = ("s3", "gs")
# One slash too: what has gone through `Path` has lost the other. One letter is a drive's.
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_CURE = "give a local path, a file:// URI, s3://bucket/prefix or gs://bucket/prefix"
# Characters that a URI keeps unescaped, and a percent sign that begins no escape.
_IN_A_URI, _BARE_PERCENT = "%/:@+;,!$&'()*=~", re.compile("%(?![0-9A-Fa-f]{2})")


def is_remote(path: str) -> bool:
    """Return whether a path lies in an object store.

    Args:
        path: a URI, or a path that `resolved` has returned.
    """
    return "://" in path and _URI.match(path) is not None


def shown(path: str) -> str:
    """Return a path or URI as messages and cache keys show it, without secrets."""
    return without_secrets(path) if is_remote(path) else path


def shown_within(settings: Any) -> Any:
    """Return settings, nested by section, with every URI as `shown` returns it."""
    if isinstance(settings, Mapping):
        return {name: shown_within(value) for name, value in settings.items()}
    return shown(settings) if isinstance(settings, str) else settings


def without_secrets(uri: str) -> str:
    """Return the URI without user, password and whatever else in it may be a secret."""
    parts = urlsplit(uri)
    query = urlencode([pair for pair in parse_qsl(parts.query) if pair[0] in _PUBLIC_QUERY], safe=":/")
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path.rstrip('/')}" + (f"?{query}" if query else "")


def scrubbed(text: str, uri: str) -> str:
    """Return a library's message about a URI without the URI's secrets.

    Each part of the URI that may be a secret becomes `...`.
    """
    parts = urlsplit(uri)
    secrets = [value for name, value in parse_qsl(parts.query) if name not in _PUBLIC_QUERY]
    user = parts.netloc.rpartition("@")[0]
    for secret in (user, *user.split(":"), parts.query, *secrets):
        for form in filter(None, (secret, unquote(secret))):
            text = text.replace(form, "...")
    return text


def resolved(path: str | Path, field: str) -> str:
    """Return the absolute path or the URI that a path stands for.

    Args:
        path: absolute, relative, with `~` or `~user`, a file:// URI, or an s3:// or gs:// URI.
        field: the name of `path` in errors.

    Returns:
        An absolute local path, with whatever characters it has; or the URI of an object store, escaped as
        URIs are. Neither ends with a slash.

    Raises:
        ValueError: it is empty, of an unknown kind, or names no place; says which, and what to give.
    """
    text = str(path)
    if not text:
        raise ValueError(f"{field} is '': {_CURE}")
    found = _URI.match(text)
    scheme = found[1].lower() if found else ""
    if scheme in _STORES:
        return _in_store(text, scheme, field)
    if scheme == "file":
        text = _of_file_uri(text, field)
    elif scheme:
        raise ValueError(f"{field} {without_secrets(text)} is of an unknown kind, {scheme}: {_CURE}")
    place = os.path.expanduser(text)  # `Path` would take ./~ for ~
    if place == text and text.startswith("~"):
        raise ValueError(f"{field} {text} is of a user without a home folder: give an absolute path")
    absolute = Path(place).absolute()  # links stay: a file may be called by its link's name alone
    if ".." not in absolute.parts:
        return str(absolute)
    after = len(absolute.parts) - absolute.parts[::-1].index("..")
    try:  # what comes before is followed, since .. of a link is its target's
        return str(Path(*absolute.parts[:after]).resolve().joinpath(*absolute.parts[after:]))
    except RuntimeError as error:
        raise ValueError(f"{field} {text} leads nowhere ({error}): give an absolute path") from None


def local(path: str | Path, field: str) -> Path:
    """Return the absolute path that a path on this machine stands for.

    Raises:
        ValueError: as `resolved`, and if the path is in an object store.
    """
    found = resolved(path, field)
    if is_remote(found):
        raise ValueError(f"{field} {shown(found)} is in an object store: give a local path")
    return Path(found)


def _in_store(uri: str, scheme: str, field: str) -> str:
    base, mark, query = uri.partition("?")
    rest = base[len(scheme) + 1 :]
    if not rest.startswith("//") or not rest.strip("/"):
        said = without_secrets(uri) if rest.startswith("//") else base
        raise ValueError(f"{field} {said} names no bucket: give {scheme}://bucket/prefix")
    escaped = quote(_BARE_PERCENT.sub("%25", rest.rstrip("/")), safe=_IN_A_URI)
    return f"{scheme}:{escaped}{mark}{query}"


def _of_file_uri(uri: str, field: str) -> str:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(
            f"{field} {uri} is a file of the host {parts.netloc!r}: give file:///absolute/path, with three "
            "slashes"
        )
    if "?" in uri or "#" in uri:
        raise ValueError(
            f"{field} {uri} has a '?' or '#', which end the path of a URI: write %3F or %23, or give the "
            "path without file://"
        )
    return unquote(parts.path)
