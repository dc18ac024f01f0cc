"""What a path that somebody gives stands for: one answer for every setting, command and function.

A path is local (absolute, relative, with `~`, or a file:// URI) or lies in an object store (s3://, gs://).
"""

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from harmonica.io.object_store import without_secrets

_STORES = ("s3", "gs")
# One slash too: what has gone through `Path` has lost the other. One letter is a drive's.
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_CURE = "give a local path, a file:// URI, s3://bucket/prefix or gs://bucket/prefix"
# Of the characters that have no place in a URI, and of a percent sign that stands for itself.
_IN_A_URI, _BARE_PERCENT = "%/:@+;,!$&'()*=~", re.compile("%(?![0-9A-Fa-f]{2})")


def is_remote(path: str) -> bool:
    """Whether a path that `resolved` has returned, or a URI, lies in an object store."""
    return "://" in path and _URI.match(path) is not None


def shown(path: str) -> str:
    """A path or URI as messages show it."""
    return without_secrets(path) if is_remote(path) else path


def resolved(path: str | Path, field: str) -> str:
    """What a path stands for, wherever the process that uses it runs.

    Args:
        path: absolute, relative, with `~` or `~user`, a file:// URI, or an s3:// or gs:// URI.
        field: what errors call `path`.

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
    """`resolved`, where only this machine will do.

    Raises:
        ValueError: as of `resolved`, and where it is in an object store.
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
