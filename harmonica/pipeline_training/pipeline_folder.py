"""Read folders of diffusers pipelines: their parts, and what can be trained.

Nothing is loaded to tell whether a pipeline can be trained: `model_index.json` names the classes.
"""

import hashlib
import inspect
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harmonica.integrations.recorded.kinds import DECLARATIONS
from harmonica.io.repository_files import INDEX
from harmonica.io.resolve import local_path
from harmonica.torchvision_ops import ensure_torchvision_imports
from harmonica.validation.extras import need
from harmonica.validation.settings import SettingError

_TRANSFORMERS = ("transformer", "transformer_2", "unconditional_transformer")
_NOT_FOR_IMAGES = ("num_frames", "video", "audio_end_in_s", "lyrics")
_OF_AN_IMAGE = ("strength", "mask_image", "control_image", "class_labels")
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
                f"model.path {path} has no readable {INDEX} ({type(error).__name__}): give the folder of a "
                "whole diffusers pipeline, as pipe.save_pretrained writes it"
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

        found = getattr(diffusers, self.class_name, None)
        if found is None:
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
    def has_vae(self) -> bool:
        return "vae" in self.parts

    def check(self, call: Mapping[str, Any]) -> None:
        """Check that a router can be trained in this pipeline with these arguments.

        Args:
            call: the arguments that are given, with their values.

        Raises:
            ValueError: the pipeline has no transformer, a refused one, or draws no images from prompts.
            SettingError: its call does not take an argument.
        """
        words = f"model.path {self.path} is a {self.class_name}"
        transformer = next((name for name in _TRANSFORMERS if name in self.parts), None)
        if transformer is None:
            has_unet = "unet" in self.parts
            raise ValueError(
                f"{words}, which has no transformer{': its denoiser is a UNet' if has_unet else ''}; give a "
                "pipeline with pipe.transformer"
            )
        for name in _TRANSFORMERS:
            denoiser = self.parts.get(name, ("", ""))[1]
            if (known := DECLARATIONS.get(denoiser)) is not None and known.refused:
                raise ValueError(f"{words} with a {denoiser}, which has no plan: {known.refused}")
        taken = inspect.signature(self.pipeline_class.__call__).parameters
        if other := next((name for name in _NOT_FOR_IMAGES if name in taken), None):
            raise ValueError(
                f"{words}, whose call takes {other}: it does not draw single images, which are judged here; "
                "train it by harmonica.train_pipeline"
            )
        others = [name for name in _OF_AN_IMAGE if name in taken]
        if others or "prompt" not in taken or "output_type" not in taken:
            raise ValueError(
                f"{words}, which does not draw images from prompts alone: give a text-to-image pipeline, or "
                "train by harmonica.train_pipeline"
            )
        for name, value in call.items():
            if name not in taken:
                raise SettingError(
                    f"pipeline.{name} is {value}, and {words}, whose call does not take it: leave it out"
                )

    def takes(self, argument: str) -> bool:
        """Return whether the pipeline's call takes an argument."""
        return argument in inspect.signature(self.pipeline_class.__call__).parameters

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
