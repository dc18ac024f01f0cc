"""Encode prompts by a pipeline's own `encode_prompt`, for training to read.

Parts, actors and resumption are those of `embed_prompts`; prompts are encoded one by one.
"""

import json
import logging
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch

from harmonica.data.embedding_store import (
    EmbeddingManifest,
    EmbeddingStore,
    embeddings_part,
    read_embedding_manifest,
)
from harmonica.data.prompt_files import MANIFEST
from harmonica.integrations.pipeline_folder import PipelineFolder
from harmonica.io.paths import shown
from harmonica.pipeline_training.prompt_encoding import PipelinePromptEncoder, embedding_names

from ..config.workflow import WorkflowConfig
from .embed_prompts import ROWS_PER_PART, PartWriter, make_part, store_folder, write_missing
from .read_prompts import distinct_texts, prepared


class PipelinePartWriter(PartWriter):
    """Encodes by a pipeline that is loaded without its transformer and VAE."""

    def __init__(self, config: WorkflowConfig, out_uri: str) -> None:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        folder = PipelineFolder.read(config.model.path, config.model.revision)
        self.storage = store_folder(out_uri)
        self._encoder: PipelinePromptEncoder | None = None
        if embedding_names(folder.pipeline_class):
            pipe = folder.load_encoders(
                dtype=getattr(torch, config.prompts.dtype),
                device="cuda" if config.prompts.use_gpu else "cpu",
            )
            self._encoder = PipelinePromptEncoder(
                pipe,
                negative_prompt=config.pipeline.negative_prompt,
                max_sequence_length=config.pipeline.max_sequence_length,
            )

    def content(self, prompts: list[str]) -> bytes:
        encoder = self._encoder
        return embeddings_part((each, encoder.encode(each) if encoder else {}) for each in prompts)


def embed_for_pipeline(config: WorkflowConfig, out_uri: str) -> EmbeddingStore:
    """Make the store of the configured prompts in `out_uri`.

    Only what is missing there is encoded.

    Raises:
        ValueError: there are no prompts, the pipeline cannot encode one alone, or `out_uri` holds a finished
            store of other prompts or settings.
    """
    storage = store_folder(out_uri)
    out_uri = storage.uri()  # absolute, as actors may run elsewhere
    storage.check_writable()
    folder = PipelineFolder.read(config.model.path, config.model.revision)
    made: dict[str, Any] = {
        "pipeline": folder.identity(),
        "dtype": config.prompts.dtype,
        "max_sequence_length": config.pipeline.max_sequence_length,
        "negative_prompt": config.pipeline.negative_prompt,
        "names": list(embedding_names(folder.pipeline_class)),
    }
    salt, parts, count = json.dumps(made, sort_keys=True), [], 0
    texts = distinct_texts(config.prompts, prepared)
    while batch := list(islice(texts, ROWS_PER_PART)):
        parts.append(make_part(f"{count:09d}", batch, salt))
        count += len(batch)
    manifest = EmbeddingManifest(**made, count=count, parts=[[part.name, part.rows] for part in parts])
    stored = read_embedding_manifest(out_uri)
    if stored is not None and stored != manifest:
        raise ValueError(
            f"prompt store {shown(out_uri)} is finished and was made of other prompts or settings: give "
            "another run id, since routers may have been trained on it"
        )
    settings = {"config": config, "out_uri": out_uri}
    write_missing(parts, config.prompts, out_uri, PipelinePartWriter, settings)
    storage.write_json(MANIFEST, asdict(manifest))
    return EmbeddingStore(out_uri)
