"""Define the files of embedded prompts: Parquet parts and a `store.json`.

`store.json` is written last. A row of a part holds a prompt, its number of tokens and their embeddings, as
the bits of bfloat16. Padding is not stored, since it is zeros.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from harmonica.io.file_systems import list_folder, open_uri
from harmonica.io.paths import shown

MANIFEST = "store.json"
_PARTS, _SUFFIX = "parts", ".parquet"
_FORMAT = 1
_SCHEMA = pa.schema([("prompt", pa.string()), ("tokens", pa.int32()), ("embedding", pa.binary())])


class PromptRows(NamedTuple):
    """Holds N embedded prompts, padded to S tokens, of width C."""

    embeddings: Tensor
    """Embeddings (N, S, C)."""
    mask: Tensor
    """Mask (N, S) bool, False at padding."""
    prompts: list[str]
    """The N prompts after preprocessing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Describes a store, as `store.json` holds it."""

    encoder: dict[str, Any]
    """The `text_encoder.encoder_identity` of the encoder that embedded."""
    dtype: str
    """The encoder's precision; stored embeddings are bfloat16."""
    max_tokens: int
    """Number of tokens that a prompt is padded to."""
    width: int
    """Width C of the embeddings."""
    count: int
    """Number of rows."""
    tokens: int
    """Number of tokens of all rows, without padding."""
    truncated: int
    """Number of rows whose prompt was truncated."""
    parts: list[list[Any]]
    """Name and rows of each part, in order."""
    negative: str
    """Name of the part that holds the negative prompt."""
    format: int = _FORMAT

    @property
    def digest(self) -> str:
        """Return the digest of the encoder and of all prompts in order.

        The prompts are in it by the names of their parts, which hold digests of them.
        """
        said = json.dumps(asdict(self), sort_keys=True)
        return f"sha256:{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def part_path(name: str) -> str:
    """Return the path of a part in its store."""
    return f"{_PARTS}/{name}{_SUFFIX}"


def stored_parts(uri: str) -> set[str]:
    """Return the names of the parts that a store has, finished or not."""
    filesystem, root = open_uri(uri, "prompt store")
    found = list_folder(filesystem, f"{root}/{_PARTS}")
    return {info.base_name.removesuffix(_SUFFIX) for info in found if info.base_name.endswith(_SUFFIX)}


def part_bytes(batches: Iterable[PromptRows]) -> bytes:
    """Return the content of a part, a Parquet file.

    Each row is a row group, so that it is read without its neighbours. It is neither compressed nor in a
    dictionary, so that reading it copies it.
    """
    sink = pa.BufferOutputStream()
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(sink, _SCHEMA, **options) as writer:
        for embeddings, mask, prompts in batches:
            counts = mask.sum(1).tolist()
            assert all(mask[row, :count].all() for row, count in enumerate(counts)), "padded on the left"
            bits = embeddings.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
            own = [bits[row, :count].tobytes() for row, count in enumerate(counts)]
            writer.write_table(pa.table([prompts, counts, own], schema=_SCHEMA), row_group_size=1)
    return bytes(sink.getvalue())


def read_manifest(uri: str) -> Manifest | None:
    """Read the manifest of a store; None if it is not written yet.

    Raises:
        ValueError: the manifest is unreadable, or of another version of this program.
    """
    filesystem, root = open_uri(uri, "prompt store")
    cure = "embed the prompts again, into a new folder"
    try:
        with filesystem.open_input_stream(f"{root}/{MANIFEST}") as stream:
            found = json.loads(stream.read())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"prompt store {shown(uri)} has a {MANIFEST} that cannot be read ({type(error).__name__}): {cure}"
        ) from None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ValueError(
            f"prompt store {shown(uri)} has a {MANIFEST} of another format than {_FORMAT}: {cure}"
        )
    return Manifest(**found)
