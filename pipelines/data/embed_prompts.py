"""Embed prompts by a pool of actors, which write the store that training reads.

The text is checked first, so that errors in it are raised before a text encoder loads. Then
each call of an actor embeds one part, `ROWS_PER_PART` prompts, and writes it whole, under a name made from
its content. So a run that was killed goes on with what is missing, and ends with the bits of one that was
not.
"""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, fields
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy

from harmonica.data import text_encoder
from harmonica.data.prompt_files import (
    MANIFEST,
    Manifest,
    PromptRows,
    part_bytes,
    part_path,
    read_manifest,
    stored_parts,
)
from harmonica.data.prompts import PromptStore
from harmonica.data.text_encoder import TextEncoder
from harmonica.io.paths import is_remote, resolved, shown
from harmonica.io.resolve import local_path

from ..config.workflow import PromptsConfig
from ..run_state.storage import RunStorage
from .read_prompts import Text, distinct_texts, prepared_for_t5

__all__ = ["PromptsConfig", "embed_prompts"]

logger = logging.getLogger(__name__)

ROWS_PER_PART = 256
"""Prompts in a part, at most 630 MB with 300 tokens of width 4096; a kill costs an actor one part."""


class Part(NamedTuple):
    """A range of consecutive distinct prompts."""

    name: str
    rows: int
    table: Any
    """Reference to a table of one row, name and prompts, in Ray's object store."""


class PartWriter(ABC):
    """A Ray Data actor that embeds a part at each call and writes it."""

    storage: RunStorage
    """The store's folder."""

    def __call__(self, table: Any) -> Any:
        name, prompts = table["name"][0].as_py(), table["prompts"][0].as_py()
        self.storage.write_bytes(part_path(name), self.content(prompts))
        return table.select(["name"])

    @abstractmethod
    def content(self, prompts: list[str]) -> bytes:
        """Return the file of a part with these prompts."""


class PartEmbedder(PartWriter):
    """Embeds by the T5 of a PixArt or Sana folder."""

    def __init__(self, config: PromptsConfig, model_path: str, out_uri: str) -> None:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # Ray would show each of its steps as a line
        logging.getLogger(text_encoder.__name__).setLevel(logging.ERROR)  # the driver warned of all at once
        device = "cuda" if config.use_gpu else "cpu"
        self.encoder = TextEncoder.load(local_path(model_path), device, config.dtype)
        self.config, self.storage = config, store_folder(out_uri)

    def content(self, prompts: list[str]) -> bytes:
        return part_bytes(self._embedded(prompts))

    def _embedded(self, prompts: list[str]) -> Iterator[PromptRows]:
        """Embed a part in batches of its own.

        A batch's composition may change the last bit.
        """
        for first in range(0, len(prompts), self.config.batch_size):
            batch = prompts[first : first + self.config.batch_size]
            yield PromptRows(*self.encoder.encode(batch, self.config.max_tokens), batch)


def embed_prompts(config: PromptsConfig, model_path: str, out_uri: str) -> PromptStore:
    """Make the store of the configured prompts in `out_uri`.

    Only what is missing there is embedded.

    Args:
        model_path: the pipeline whose text encoder embeds, as `model.path`.
        out_uri: a folder of its own, local or s3://.

    Raises:
        ValueError: there are no prompts, invalid ones or no text encoder, or `out_uri` holds another store.
    """
    storage = store_folder(out_uri)
    out_uri = storage.uri()  # absolute, as actors may run elsewhere
    storage.check_writable()
    identity = text_encoder.encoder_identity(local_path(model_path), config.max_tokens)
    salt = json.dumps([identity, config.dtype], sort_keys=True)
    parts, count, tokens, truncated = [], 0, 0, 0
    texts = distinct_texts(config, partial(prepared_for_t5, model_path=model_path))
    while batch := list(islice(texts, ROWS_PER_PART)):
        parts.append(make_part(f"{count:09d}", batch, salt))
        count += len(batch)
        tokens += sum(min(text.tokens, config.max_tokens) for text in batch)
        truncated += sum(text.tokens > config.max_tokens for text in batch)
    negative = make_part("negative", [Text("", b"", 1)], salt)
    manifest = Manifest(
        encoder=identity,
        dtype=config.dtype,
        max_tokens=config.max_tokens,
        width=identity["d_model"],
        count=count,
        tokens=tokens,
        truncated=truncated,
        parts=[[part.name, part.rows] for part in parts],
        negative=negative.name,
    )
    _check_unused(out_uri, manifest)
    settings = {"config": config, "model_path": model_path, "out_uri": out_uri}
    write_missing([*parts, negative], config, out_uri, PartEmbedder, settings)
    storage.write_json(MANIFEST, asdict(manifest))
    return PromptStore(out_uri)


def store_folder(out_uri: str) -> RunStorage:
    place = resolved(out_uri, "prompt store")
    base, mark, query = place.partition("?") if is_remote(place) else (place, "", "")
    parent, _, name = base.rpartition("/")
    return RunStorage(f"{parent or '/'}{mark}{query}", name)


def make_part(label: str, texts: list[Text], salt: str) -> Part:
    """Make a part; `salt` is what embeddings depend on besides the prompts."""
    content = hashlib.sha256(salt.encode() + b"".join(text.digest for text in texts)).hexdigest()[:16]
    name, prompts = f"{label}-{content}", [text.prompt for text in texts]
    table = pa.table({"name": [name], "prompts": pa.array([prompts], pa.list_(pa.string()))})
    return Part(name, len(texts), ray.put(table))


def _check_unused(out_uri: str, manifest: Manifest) -> None:
    stored = read_manifest(out_uri)
    if stored is None or stored == manifest:
        return
    names = [one.name for one in fields(Manifest) if getattr(stored, one.name) != getattr(manifest, one.name)]
    raise ValueError(
        f"prompt store {shown(out_uri)} is finished and has another {', '.join(names)} than asked for: give "
        "another folder, since routers may have been trained on it"
    )


def write_missing(
    parts: list[Part], config: PromptsConfig, out_uri: str, writer: type[PartWriter], settings: dict[str, Any]
) -> None:
    """Write those of the parts that the store lacks.

    Args:
        writer: made with `settings` on each actor.
    """
    stored = stored_parts(out_uri)
    missing = [part for part in parts if part.name not in stored]
    logger.info("%d prompts in %d parts, %d to embed", sum(p.rows for p in parts), len(parts), len(missing))
    if not missing:
        return
    tables = ray.data.from_arrow_refs([part.table for part in missing])
    written = tables.map_batches(
        writer,
        fn_constructor_kwargs=settings,
        compute=ActorPoolStrategy(size=min(config.num_actors, len(missing))),
        batch_format="pyarrow",
        batch_size=1,
        num_cpus=1,
        num_gpus=1 if config.use_gpu else None,
    )
    names = {name for batch in written.iter_batches(batch_size=None) for name in batch["name"]}
    assert names == {part.name for part in missing}
