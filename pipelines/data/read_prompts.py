"""Read distinct prompts in the order of the files, checked as a whole.

The driver keeps 16 bytes of each prompt; the text itself goes through it and on.
"""

import codecs
import hashlib
import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from pyarrow import fs

from harmonica.data import text_encoder
from harmonica.io.file_systems import open_uri
from harmonica.io.paths import shown
from harmonica.io.resolve import local_path

from ..config.workflow import PromptsConfig

logger = logging.getLogger(__name__)

_TEXTS_PER_TASK, _BLOCK = 4096, 2**20
_SCHEMA = pa.schema([("prompt", pa.string()), ("digest", pa.binary()), ("tokens", pa.int32())])


class Text(NamedTuple):
    """A preprocessed prompt, as the text encoder reads it."""

    prompt: str
    digest: bytes
    tokens: int


Prepare = Callable[[Any], Any]
"""Makes the columns prompt, digest and tokens of rows of text in one column; drops empty rows."""


def distinct_texts(config: PromptsConfig, prepare: Prepare) -> Iterator[Text]:
    """Yield every distinct prompt, in the order of first occurrence.

    Empty prompts are left out.

    Args:
        prepare: `prepared_for_t5`, or `prepared`.

    Raises:
        ValueError: there are none, or some are too long and are to be refused; raised once all are read.
    """
    seen: set[bytes] = set()
    first_over, over = None, 0
    for text in _all_texts(config, prepare):
        if text.digest not in seen:
            seen.add(text.digest)
            if text.tokens > config.max_tokens:
                first_over, over = first_over or text, over + 1
            yield text
    path = shown(config.path)
    if not seen:
        raise ValueError(f"prompts.path {path} holds no prompts: give at least one line of text")
    if first_over is None:
        return
    prompt, _, tokens = first_over
    message = text_encoder.over_limit_message(prompt, tokens, over, len(seen), config.max_tokens)
    if config.over_limit == "refuse":
        raise ValueError(
            f"prompts.path {path}: {message}: shorten them, or set prompts.over_limit to truncate"
        )
    logger.warning("prompts.path %s: %s; they lose their end", path, message)


def _files(path: str) -> tuple[fs.FileSystem, list[str]]:
    """Return the files of text, sorted; their order is the prompts' order."""
    if not path:
        raise ValueError("prompts.path is '': give a .txt or .parquet file, or a folder of them")
    filesystem, root = open_uri(path, "prompts.path")
    try:
        info = filesystem.get_file_info(root)
        inside = fs.FileSelector(root, recursive=True)
        found = [info] if info.is_file else filesystem.get_file_info(inside)
    except OSError as error:
        raise ValueError(
            f"prompts.path {shown(path)} cannot be read ({type(error).__name__}): give a .txt or .parquet "
            "file, or a folder of them"
        ) from None
    for suffix in (".parquet", ".txt"):
        if names := sorted(one.path for one in found if one.is_file and one.path.endswith(suffix)):
            return filesystem, names
    raise ValueError(
        f"prompts.path {shown(path)} holds neither .parquet nor .txt: give such a file or a folder of them"
    )


def _source(config: PromptsConfig) -> ray.data.Dataset:
    """Return the dataset of unprocessed text, in one column."""
    filesystem, names = _files(config.path)
    if names[0].endswith(".txt"):  # and a byte-order mark is no part of the first prompt
        return ray.data.read_text(names, filesystem=filesystem, encoding="utf-8-sig")
    with filesystem.open_input_file(names[0]) as file:
        _check_column(pq.read_schema(file), config)
    return ray.data.read_parquet(names, filesystem=filesystem).select_columns([config.column])


def _check_column(schema: pa.Schema, config: PromptsConfig) -> None:
    kind = schema.field(config.column).type if config.column in schema.names else None
    if kind not in (pa.string(), pa.large_string()):
        held = ", ".join(f"{one.name} ({one.type})" for one in schema)
        raise ValueError(f"prompts.column is {config.column!r}: give a column of text, of {held}")


@cache
def _tokenizer(model_path: str) -> Any:
    """Return the tokenizer of this process."""
    return text_encoder.load_tokenizer(local_path(model_path))


def prepared_for_t5(rows: Any, model_path: str) -> Any:
    """Prepare text as a PixArt pipeline does, and count its tokens."""
    prompts = [text_encoder.preprocess(text) for text in rows[0].to_pylist() if text is not None]
    prompts = [prompt for prompt in prompts if prompt]
    return _table(prompts, text_encoder.token_counts(_tokenizer(model_path), prompts))


def prepared(rows: Any) -> Any:
    """Strip text, and count no tokens: the encoding pipeline sees what is too long."""
    prompts = [text.strip() for text in rows[0].to_pylist() if text is not None and text.strip()]
    return _table(prompts, [0] * len(prompts))


def _table(prompts: list[str], tokens: list[int]) -> Any:
    digests = [hashlib.blake2b(prompt.encode(), digest_size=16).digest() for prompt in prompts]
    return pa.table([prompts, digests, tokens], schema=_SCHEMA)


def check_prompts(config: PromptsConfig) -> None:
    """Check, without Ray, that there is a prompt in the files.

    Raises:
        ValueError: files cannot be read, or hold no prompt; names field, value and cure.
    """
    filesystem, names = _files(config.path)
    for name in names:
        try:
            with filesystem.open_input_file(name) as file:
                if _has_prompt(file, name, config):
                    return
        except (OSError, pa.ArrowException) as error:
            raise ValueError(
                f"prompts.path {shown(config.path)} cannot be read ({type(error).__name__}): give a .txt or "
                ".parquet file, or a folder of them"
            ) from None
    raise ValueError(f"prompts.path {shown(config.path)} holds no prompts: give at least one line of text")


def _has_prompt(file: Any, name: str, config: PromptsConfig) -> bool:
    if name.endswith(".txt"):
        blocks = iter(lambda: file.read(_BLOCK), b"")
        return any(block.removeprefix(codecs.BOM_UTF8).strip() for block in blocks)
    parquet = pq.ParquetFile(file)
    _check_column(parquet.schema_arrow, config)
    batches = parquet.iter_batches(columns=[config.column])
    return any(text and text.strip() for batch in batches for text in batch[0].to_pylist())


def _all_texts(config: PromptsConfig, prepare: Prepare) -> Iterator[Text]:
    """Yield every prompt of the input that is not empty, in order."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.use_datasource_v2 = False  # V2 starts 32 actors to read Parquet's footers
    prepared = _source(config).map_batches(
        prepare,
        batch_format="pyarrow",
        batch_size=_TEXTS_PER_TASK,
    )
    batch: Any  # an Arrow table
    for batch in prepared.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from map(Text, *(batch[name].to_pylist() for name in _SCHEMA.names))
