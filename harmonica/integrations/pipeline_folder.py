"""Read folders of diffusers pipelines: their parts, and what a call takes.

Nothing is loaded to tell whether a pipeline can be trained or served: `model_index.json` names the classes.
"""

import hashlib
import inspect
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from harmonica.io.paths import shown
from harmonica.io.repository_files import INDEX
from harmonica.io.resolve import local_path
from harmonica.io.weight_files import read_json
from harmonica.models.vae import are_pixels
from harmonica.torchvision_ops import ensure_torchvision_imports
from harmonica.validation.extras import need

_TRANSFORMERS = ("transformer", "transformer_2", "unconditional_transformer")
_SMALL = 2**20


@dataclass(frozen=True)
class PipelineFolder:
    """A diffusers pipeline's folder, by its `model_index.json`."""

    path: Path
    class_name: str
    parts: Mapping[str, tuple[str, str]]
    """Library and class of each part that is there, by its name."""

    @classmethod
    def read(cls, path: str, revision: str = "") -> "PipelineFolder":
        """Read the folder at a path, fetched if it is remote.

        Raises:
            ValueError: it is not there, or no folder of a pipeline.
        """
        folder = local_path(path, revision)
        try:
            index = json.loads((folder / INDEX).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model.path {shown(path)} has no readable {INDEX} ({type(error).__name__}): give the folder "
                "of a whole diffusers pipeline, as pipe.save_pretrained writes it"
            ) from None
        parts = {
            name: (value[0], value[1])
            for name, value in index.items()
            if isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) for one in value)
        }
        return cls(folder, str(index.get("_class_name")), parts)

    @property
    def pipeline_class(self) -> Any:
        """Return the pipeline's class in diffusers.

        Raises:
            ValueError: the installed diffusers has none of that name.
        """
        ensure_torchvision_imports()
        need("diffusers", extra="diffusers")
        import diffusers

        found = getattr(diffusers, self.class_name, None) if self.class_name.isidentifier() else None
        if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
            raise ValueError(
                f"model.path {self.path} is a {self.class_name}, which diffusers {diffusers.__version__} "
                "does not have: install the version that wrote it, or give a pipeline of diffusers' own"
            )
        return found

    @property
    def encoders(self) -> tuple[str, ...]:
        """Return the parts that only encode prompts.

        Training leaves them out where it has embeddings.
        """
        return tuple(name for name, (library, _) in self.parts.items() if library == "transformers")

    @property
    def transformers(self) -> tuple[str, ...]:
        """Return the classes of the denoisers, in the order in which they are used."""
        return tuple(self.parts[name][1] for name in _TRANSFORMERS if name in self.parts)

    @property
    def has_pictures(self) -> bool:
        """Return whether the pipeline ends in pictures, decoded or drawn as pixels."""
        config = self.path / "transformer" / "config.json"
        channels = read_json(config).get("in_channels") if config.is_file() else None
        return self.has_vae or are_pixels(channels)

    @property
    def has_unet(self) -> bool:
        return "unet" in self.parts

    @property
    def has_vae(self) -> bool:
        return "vae" in self.parts

    @cached_property
    def defaults(self) -> Mapping[str, Any]:
        """Arguments of the pipeline's call, with their default values.

        Raises:
            ValueError: the installed diffusers has no such class.
        """
        parameters = inspect.signature(self.pipeline_class.__call__).parameters
        return {name: parameter.default for name, parameter in parameters.items()}

    def takes(self, argument: str) -> bool:
        """Return whether the pipeline's call takes an argument."""
        return argument in self.defaults

    def identity(self) -> dict[str, Any]:
        """Return the pipeline's class, and digests of what encodes prompts.

        They are of file names, sizes and configurations.
        """
        digests = {}
        for name in self.encoders:
            seen = hashlib.sha256()
            for file in sorted((self.path / name).rglob("*")):
                if file.is_file():
                    size = file.stat().st_size
                    seen.update(f"{file.relative_to(self.path)} {size}\n".encode())
                    if file.suffix == ".json" and size < _SMALL:
                        seen.update(file.read_bytes())
            digests[name] = seen.hexdigest()[:16]
        return {"class": self.class_name, "parts": digests}

    def load(self, *, dtype: torch.dtype, device: torch.device | str, without: Collection[str] = ()) -> Any:
        """Load the pipeline, frozen, with None for the parts that are left out.

        Raises:
            ValueError: its files cannot be read, or do not fit one another.
        """
        kind = self.pipeline_class
        from diffusers.utils import logging

        logging.disable_progress_bar()
        left_out = {name: None for name in without if name in self.parts}
        try:
            pipe = kind.from_pretrained(
                str(self.path), dtype=dtype, local_files_only=True, use_safetensors=True, **left_out
            )
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"model.path {self.path} cannot be loaded ({first}): fetch the folder again, with its "
                "weights as safetensors"
            ) from error
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)

    def load_encoders(self, *, dtype: torch.dtype, device: torch.device | str) -> Any:
        """Load the pipeline without its transformers and its VAE, to encode prompts."""
        return self.load(dtype=dtype, device=device, without=(*_TRANSFORMERS, "vae"))

    def load_denoiser(self, *, dtype: torch.dtype, device: torch.device | str, embedded: bool) -> Any:
        """Load the pipeline to sample; without its encoders where prompts are embedded."""
        return self.load(dtype=dtype, device=device, without=self.encoders if embedded else ())
