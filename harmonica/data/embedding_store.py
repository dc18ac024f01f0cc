"""Store what a diffusers pipeline's `encode_prompt` gave, by its own names.

A folder of Parquet parts and a `store.json`, which is written last. A row of a part holds a prompt and its
tensors as safetensors, under the names of the pipeline's arguments. What the negative prompt gave is the
same for most rows of a part: it is stored with the first row, and with those where it differs.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load, save
from torch import Tensor

from harmonica.data.prompt_files import MANIFEST, part_path
from harmonica.io.file_systems import open_uri
from harmonica.io.paths import shown

Embedding = dict[str, Tensor | list[Tensor]]
"""The tensors of one prompt by the names of the pipeline's arguments: each (1, ...), or a list of one."""
_FORMAT = "pipeline-1"
_NEGATIVE, _IN_LIST = "negative_", "[]"
_SCHEMA = pa.schema([("prompt", pa.string()), ("tensors", pa.binary()), ("negative", pa.binary())])
_OPEN_PARTS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingManifest:
    """The description of a store, as `store.json` holds it."""

    pipeline: dict[str, Any]
    """Class of the pipeline and digests of the parts of its folder that encode."""
    dtype: str
    """The encoders' precision."""
    max_sequence_length: int
    """Tokens of a prompt at most; 0 for the pipeline's own."""
    negative_prompt: str
    names: list[str]
    """The pipeline's arguments that its `encode_prompt` gives; none where prompts stay texts."""
    count: int
    """Number of rows."""
    parts: list[list[Any]]
    """Name and rows of each part, in order."""
    format: str = _FORMAT

    @property
    def digest(self) -> str:
        """Return the digest of the encoders and of all prompts in order.

        Part names hold the latter.
        """
        said = json.dumps(asdict(self), sort_keys=True)
        return f"sha256:{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def embeddings_part(rows: Iterable[tuple[str, Embedding]]) -> bytes:
    """Return the content of a part, a Parquet file with a row group a row."""
    sink = pa.BufferOutputStream()
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    first: bytes | None = None
    with pq.ParquetWriter(sink, _SCHEMA, **options) as writer:
        for prompt, embedding in rows:
            both = {name: one for name, one in embedding.items() if not name.startswith(_NEGATIVE)}
            negative = _saved({name: one for name, one in embedding.items() if name not in both})
            stored = None if negative == first else negative
            first = negative if first is None else first
            writer.write_table(
                pa.table([[prompt], [_saved(both)], [stored]], schema=_SCHEMA), row_group_size=1
            )
    return bytes(sink.getvalue())


def _saved(embedding: Embedding) -> bytes:
    tensors = {
        name + (_IN_LIST if isinstance(one, list) else ""): one[0] if isinstance(one, list) else one
        for name, one in embedding.items()
    }
    return save({name: one.detach().cpu().contiguous().clone() for name, one in tensors.items()})


def _loaded(stored: bytes) -> Embedding:
    return {
        name.removesuffix(_IN_LIST): [one] if name.endswith(_IN_LIST) else one
        for name, one in load(stored).items()
    }


def read_embedding_manifest(uri: str) -> EmbeddingManifest | None:
    """Read the manifest of a store; None if it is not written yet.

    Raises:
        ValueError: the manifest is unreadable, or that of another kind of store.
    """
    filesystem, root = open_uri(uri, "prompt store")
    try:
        with filesystem.open_input_stream(f"{root}/{MANIFEST}") as stream:
            found = json.loads(stream.read())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"prompt store {shown(uri)} has a {MANIFEST} that cannot be read ({type(error).__name__}): embed "
            "the prompts again, into a new folder"
        ) from None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ValueError(
            f"prompt store {shown(uri)} holds no embeddings of a diffusers pipeline: embed the prompts "
            "again, into a new folder"
        )
    try:
        return EmbeddingManifest(**found)
    except TypeError as error:
        raise ValueError(
            f"prompt store {shown(uri)} has a {MANIFEST} of other fields ({error}): embed the prompts again, "
            "into a new folder"
        ) from None


class EmbeddingStore(Sequence[Mapping[str, Any] | str]):
    """A finished store, as the prompts that `harmonica.train_pipeline` takes.

    A pickled store holds the address alone, and opens the store again when it is loaded.
    """

    def __init__(self, uri: str | Path) -> None:
        """Open a finished store.

        Raises:
            ValueError: there is no store, or an unfinished one.
        """
        self.uri = str(uri)
        manifest = read_embedding_manifest(self.uri)
        if manifest is None:
            raise ValueError(
                f"prompt store {shown(self.uri)} has no {MANIFEST}: run the stage prompts again, which makes "
                "what is missing"
            )
        self.manifest = manifest
        self._open: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._negatives: dict[str, bytes] = {}

    def __reduce__(self) -> tuple[type["EmbeddingStore"], tuple[str]]:
        return EmbeddingStore, (self.uri,)

    def __len__(self) -> int:
        return self.manifest.count

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([rows for _, rows in self.manifest.parts])

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any] | str: ...
    @overload
    def __getitem__(self, index: slice) -> list[Mapping[str, Any] | str]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """Return a row: its tensors, or its text where the pipeline takes no embeddings."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not self.manifest.names:
            return self.text(index)
        name, row = self._place(index)
        return self._read(name, row)

    def text(self, index: int) -> str:
        """Return the prompt of a row."""
        name, row = self._place(index)
        prompt: str = self._row(name, row)["prompt"][0].as_py()
        return prompt

    def _place(self, index: int) -> tuple[str, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"prompt store {shown(self.uri)} has no row {index}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        name, rows = self.manifest.parts[part]
        return name, index - int(self._ends[part]) + rows

    def _read(self, name: str, row: int) -> Embedding:
        found = self._row(name, row)
        if name not in self._negatives:
            self._negatives[name] = (found if row == 0 else self._row(name, 0))["negative"][0].as_py()
        negative = found["negative"][0].as_py() or self._negatives[name]
        return _loaded(found["tensors"][0].as_py()) | _loaded(negative)

    def _row(self, name: str, row: int) -> pa.Table:
        try:
            return self._part(name).read_row_group(row)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(
                f"prompt store {shown(self.uri)} has no readable {part_path(name)} "
                f"({type(error).__name__}): delete it and run the stage prompts again"
            ) from None

    def _part(self, name: str) -> pq.ParquetFile:
        if name not in self._open:
            filesystem, root = open_uri(self.uri, "prompt store")
            source = filesystem.open_input_file(f"{root}/{part_path(name)}")
            self._open[name] = pq.ParquetFile(source, pre_buffer=True)
            if len(self._open) > _OPEN_PARTS:
                self._open.popitem(last=False)
        return self._open[name]
