"""Read a run's prompts for a pipeline, and the arguments of its calls."""

from typing import Any

from harmonica.data.embedding_store import EmbeddingStore
from harmonica.integrations.pipeline_folder import PipelineFolder
from harmonica.pipeline_training.prompt_encoding import embedding_names

from ..config.workflow import WorkflowConfig
from ..run_state.resume import work_folder
from ..run_state.storage import RunStorage


def open_prompts(config: WorkflowConfig) -> EmbeddingStore:
    """Return what the run's stage prompts has made.

    Raises:
        ValueError: it is not finished.
    """
    storage = RunStorage(config.storage_path, config.run_id)
    return EmbeddingStore(storage.uri(work_folder("prompts", storage)))


def pipeline_call(config: WorkflowConfig, folder: PipelineFolder) -> dict[str, Any]:
    """Return the arguments of each of the pipeline's calls beside prompts and noise."""
    call = config.pipeline.call(config.sampler.num_inference_steps)
    if embedding_names(folder.pipeline_class):
        return call
    settings = config.pipeline
    texts = {
        "negative_prompt": settings.negative_prompt,
        "max_sequence_length": settings.max_sequence_length,
    }
    return call | {name: value for name, value in texts.items() if value and folder.takes(name)}
