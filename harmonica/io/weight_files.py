"""The reading of a part's folder: its JSON files, and its memory-mapped weights."""

import json
from pathlib import Path
from typing import Any

from harmonica.io.repository_files import MODEL_STEMS, Weights, choose_weights, listing
from harmonica.io.safe_load import read_state


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is unreadable, or holds no object.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object: fetch it again")
    return value


def contents(folder: Path) -> str:
    """Return the names in a folder, for an error."""
    return listing(path.name + "/" * path.is_dir() for path in folder.iterdir())


def find_weights(folder: Path, stems: tuple[str, ...] = MODEL_STEMS) -> Weights:
    """Return the weight files to load of a part's folder, all of which are there.

    Raises:
        ValueError: there are none, or shards are missing; the message names them and the files there.
    """
    chosen = choose_weights([path.name for path in folder.iterdir()], stems) if folder.is_dir() else None
    if chosen is None:
        held = f"; it holds {contents(folder)}" if folder.is_dir() else ""
        raise ValueError(
            f"{folder} has no {stems[0]}.safetensors or {stems[-1]}.bin, whole or with an index, of full "
            f"precision, bf16 or fp16{held}: fetch the weights too"
        )
    if chosen.index:
        named = set(_weight_map(folder / chosen.index).values())
        if missing := sorted(named - set(chosen.files)):
            raise ValueError(
                f"{folder} lacks {', '.join(missing)}, named in {chosen.index}: fetch the weights again"
            )
    return chosen


def read_weights(folder: Path) -> dict[str, Any]:
    """Read the weights of a transformer's folder, memory-mapped.

    They are in one file or in shards.

    Raises:
        ValueError: they are missing or unreadable.
    """
    chosen = find_weights(folder)
    if not chosen.index:
        return read_state(folder / chosen.files[0])
    places, state = _weight_map(folder / chosen.index), {}
    shards = {name: read_state(folder / name) for name in sorted(set(places.values()))}
    for key, name in places.items():
        if key not in shards[name]:
            raise ValueError(
                f"{folder / name} lacks {key}, which {chosen.index} places there: fetch it again"
            )
        state[key] = shards[name][key]
    return state


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(Path(str(name)).name == name for name in files.values()):
        raise ValueError(f"{index} has no usable weight_map of file names: fetch it again")
    return files
