"""Render the kustomizations of cluster/: resources, an image's new name, and JSON patches (RFC 6902)."""

import copy
from pathlib import Path
from typing import Any

import yaml

_FIELDS = {"apiVersion", "kind", "resources", "images", "patches"}
"""What is rendered; kustomize knows more."""


def render(folder: Path) -> list[Any]:
    """Return the documents that `kubectl kustomize` would print, in the order of the files.

    Raises:
        ValueError: the kustomization has a field that is not rendered here, a patch that changes nothing, or
            one whose operation cannot be done.
    """
    given = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := given.keys() - _FIELDS:
        raise ValueError(f"{folder}: {sorted(unknown)} is not rendered here")
    documents: list[Any] = []
    for name in given.get("resources", ()):
        place = folder / name
        documents += render(place) if place.is_dir() else yaml.safe_load_all(place.read_text())
    # A copy of each: YAML's anchors make one object of several places, and patches change one.
    documents = [_unshared(document) for document in documents]
    for image in given.get("images", ()):
        for document in documents:
            _rename(document, image["name"], image["newName"])
    for entry in given.get("patches", ()):
        text = entry["patch"] if "patch" in entry else (folder / entry["path"]).read_text()
        found = [each for each in documents if _is_target(each, entry["target"])]
        if not found:
            raise ValueError(f"{folder}: no resource is {entry['target']}")
        for document in found:
            for operation in yaml.safe_load(text):
                apply(document, _unshared(operation))
    return documents


def apply(document: Any, operation: dict[str, Any]) -> None:
    """Apply `add`, `replace`, `remove` or `test` of RFC 6902, in place.

    Raises:
        ValueError: there is no such place, the test fails, or the operation is another one.
    """
    kind, path = operation["op"], operation["path"]
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]
    try:
        for part in parents:
            document = document[int(part) if isinstance(document, list) else part]
        if isinstance(document, list):
            place: Any = len(document) if last == "-" else int(last)
            if kind == "add" and place <= len(document):
                document.insert(place, operation["value"])
                return
        else:
            place = last
            if kind == "add":
                document[place] = operation["value"]
                return
        present = document[place]
        if kind == "replace":
            document[place] = operation["value"]
        elif kind == "remove":
            del document[place]
        elif kind != "test" or present != operation["value"]:
            raise ValueError(f"{kind} of {path}: it is {present!r}")
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{kind} of {path}: there is no such place") from error


def _is_target(document: Any, target: dict[str, str]) -> bool:
    return document["kind"] == target["kind"] and target.get("name") in (None, document["metadata"]["name"])


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else copy.copy(value)


def _rename(value: Any, name: str, new: str) -> None:
    """Give the containers of an image its new name; the tag stays."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _rename(item, name, new)
    if isinstance(value, dict):
        for container in value.get("containers", ()):
            image, colon, tag = container["image"].partition(":")
            if image == name:
                container["image"] = f"{new}{colon}{tag}"
