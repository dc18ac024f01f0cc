"""Reading and writing of diffusers folders, of a pipeline or of its transformer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmonica.io.repository_files import INDEX, MODEL_STEMS, listed_parts
from harmonica.io.tensor_files import write_tensors
from harmonica.io.weight_files import contents, read_json, read_weights
from harmonica.models.dit.diffusers_layout import (
    CLASS_NAME,
    config_from_diffusers,
    config_to_diffusers,
    tensors_from_diffusers,
    tensors_to_diffusers,
)
from harmonica.models.dit.stored import StoredModel, default_class_names
from harmonica.models.vae import find_vae

TEXT_PARTS = ("text_encoder", "tokenizer")

# The process the public models were trained on, visited at the public code's timesteps.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "clip_sample": False,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "linspace",
}


def find_transformer(folder: Path) -> Path | None:
    """Return the transformer's folder: `transformer` in it, `folder` itself, or None."""
    if (folder / "transformer" / "config.json").is_file():
        return folder / "transformer"
    config = folder / "config.json"
    return folder if config.is_file() and "_class_name" in read_json(config) else None


@dataclass(frozen=True, slots=True)
class PipelineParts:
    """The contents of a pipeline's folder beside the transformer."""

    class_name: str
    """Class of the pipeline; empty for the folder of a transformer alone."""
    id2label: object
    scheduler: dict[str, Any] | None
    vae_folder: Path | None
    has_text_encoder: bool
    """Whether the pipeline has a text encoder, even if files of it are missing."""

    @classmethod
    def read(cls, folder: Path) -> "PipelineParts":
        """Read what a pipeline's folder says of its parts."""
        index, scheduler = folder / INDEX, folder / "scheduler" / "scheduler_config.json"
        described = read_json(index) if index.is_file() else {}
        parts = listed_parts(index.read_bytes(), str(index)) if index.is_file() else ()
        return cls(
            class_name=str(described.get("_class_name", "")),
            id2label=described.get("id2label"),
            scheduler=read_json(scheduler) if scheduler.is_file() else None,
            vae_folder=find_vae(folder),
            has_text_encoder=any(name in parts or (folder / name).is_dir() for name in TEXT_PARTS),
        )


def _class_names(id2label: object, count: int) -> tuple[str, ...] | None:
    if not isinstance(id2label, dict):
        return None
    return tuple(str(id2label.get(str(i), i)) for i in range(count))


def read_diffusers(folder: Path) -> StoredModel:
    """Read a DiT from the folder of a pipeline or of its transformer.

    Raises:
        ValueError: no transformer, or one that is no DiT.
    """
    transformer = find_transformer(folder)
    if transformer is None:
        raise ValueError(
            f"model.path {folder} is a diffusers folder without transformer/config.json; it holds "
            f"{contents(folder)}: give the folder of a DiT pipeline or of its transformer"
        )
    config = config_from_diffusers(read_json(transformer / "config.json"), f"model.path {transformer}")
    tensors = tensors_from_diffusers(config, read_weights(transformer), f"model.path {transformer}")
    parts = PipelineParts.read(folder)
    return StoredModel(
        config=config,
        tensors=tensors,
        class_names=_class_names(parts.id2label, config.num_embeds_ada_norm) or default_class_names(config),
        source=f"model.path {transformer}",
        scheduler=parts.scheduler,
        vae_folder=parts.vae_folder,
    )


def write_diffusers(folder: Path, stored: StoredModel) -> None:
    """Write a pipeline's folder, without the VAE, which belongs into `vae/`."""
    config = config_to_diffusers(stored.config)
    version = config["_diffusers_version"]
    index: dict[str, Any] = {"_class_name": "DiTPipeline", "_diffusers_version": version}
    if stored.class_names != default_class_names(stored.config):
        index["id2label"] = {str(i): name for i, name in enumerate(stored.class_names)}
    scheduler = stored.scheduler or {**SCHEDULER, "_diffusers_version": version}
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    index["transformer"] = ["diffusers", CLASS_NAME]
    index["vae"] = ["diffusers", "AutoencoderKL"]
    for name, value in (
        (INDEX, index),
        ("scheduler/scheduler_config.json", scheduler),
        ("transformer/config.json", config),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    weights = folder / "transformer" / f"{MODEL_STEMS[0]}.safetensors"
    write_tensors(tensors_to_diffusers(stored), weights, metadata={"format": "pt"})
