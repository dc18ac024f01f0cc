"""Whether the endpoint draws with a transformer class, by the pipeline of diffusers that has it.

A pipeline is refused by its class, before weights are read; one that is not is made of the tiny transformer
and a scheduler, and generates under a plan by the code that serves. Texts are stood in for by random
embeddings, and the VAE by three numbers of each image's latents.
"""

import inspect
import json
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from served_transformer_overrides import OVERRIDES, TEXT, WIDTH, embedded
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.integrations.pipeline_folder import PipelineFolder
from harmonica.models.loading import ModelConfig
from pipelines.serving.image_request import ImageRequest
from pipelines.serving.pictures import plain_picture
from pipelines.serving.pipeline_sampler import PipelineSampler
from pipelines.serving.servable_pipeline import ServablePipeline, servable_pipeline

SIDE = 64


@cache
def pipelines_of() -> dict[str, list[str]]:
    """Return the names of the pipelines whose `transformer` is of a class, the shortest first."""
    found: dict[str, list[str]] = {}
    for name in sorted((name for name in dir(diffusers) if name.endswith("Pipeline")), key=len):
        kind = getattr(diffusers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
            continue
        parameter = inspect.signature(kind.__init__).parameters.get("transformer")
        for cls in re.findall(r"\w+", str(parameter.annotation) if parameter else ""):
            found.setdefault(cls, []).append(name)
    return found


def folder_of(pipeline: str, transformer: str) -> ServablePipeline | str | None:
    """Return what the endpoint reads of a pipeline's folder, or why it refuses it."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        parts = {"transformer": ["diffusers", transformer], "vae": ["diffusers", "AutoencoderKL"]}
        (folder / "transformer").mkdir()
        (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **parts}))
        (folder / "transformer/config.json").write_text(json.dumps({"_class_name": transformer}))
        try:
            return servable_pipeline(ModelConfig(path=path))
        except ValueError as refusal:
            return str(refusal).removeprefix(f"model.path is {path}, ")


class Drawn:
    """A pipeline that is called with texts and gives images, without text encoders and VAE."""

    def __init__(self, pipe: Any, override: dict[str, Any]) -> None:
        self._pipe, self._override = pipe, override

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def __call__(self, **call: Any) -> tuple[Tensor]:
        names = inspect.signature(type(self._pipe).__call__).parameters
        count = len(call["generator"])
        height, width = call["height"], call["width"]
        texts = {name: call.get(name) for name in ("prompt", "negative_prompt")}
        call.pop("num_images_per_prompt", None)
        has_own = "methods" in self._override  # it makes its embeddings of the texts by itself
        for prefix, name in () if has_own else (("", "prompt"), ("negative_", "negative_prompt")):
            given = texts[name] or [""]
            rows = [given] * count if isinstance(given, str) else given * (count // len(given))
            for suffix, shape in self._shapes.items():
                if prefix + suffix in names:
                    call[prefix + suffix] = shape(rows)
        if not has_own:
            call |= dict.fromkeys(texts)
        call |= self._override.get("call", {}) | {"output_type": "latent"}
        latents = self._pipe(**{key: value for key, value in call.items() if key in names})[0]
        latents = latents if isinstance(latents, Tensor) else torch.stack(list(latents))
        colours = latents.float().flatten(1)[:, :3].sigmoid()
        return (colours[..., None, None].expand(-1, -1, height, width),)

    @property
    def _shapes(self) -> dict[str, Any]:
        shapes = {
            "prompt_embeds": lambda rows: embedded(rows, TEXT, WIDTH),
            "pooled_prompt_embeds": lambda rows: embedded(rows, WIDTH),
            **dict.fromkeys(
                ("prompt_embeds_mask", "prompt_attention_mask"),
                lambda rows: torch.ones(len(rows), TEXT, dtype=torch.bool),
            ),
        }
        return shapes | self._override.get("texts", {})


def make_pipeline(name: str, transformer: Any) -> Drawn:
    """Return a pipeline of nothing but a transformer and a scheduler."""
    kind, override = getattr(diffusers, name), OVERRIDES.get(name, {})
    parts: dict[str, Any] = {
        part: None
        for part, parameter in inspect.signature(kind.__init__).parameters.items()
        if part != "self" and parameter.default is parameter.empty
    }
    parts |= {"scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": transformer}
    pipe = kind(**parts | {part: make() for part, make in override.get("parts", {}).items()})
    pipe.set_progress_bar_config(disable=True)
    for method, function in override.get("methods", {}).items():
        setattr(pipe, method, function)
    return Drawn(pipe, override)


def draw(pipeline: ServablePipeline, transformer: Any, artifact: RouterArtifact) -> None:
    """Generate two images under a plan and without one.

    Raises:
        AssertionError: they are the same, or not finite.
    """
    pipe, folder = make_pipeline(pipeline.class_name, transformer), pipeline.folder

    class Folder(PipelineFolder):
        def load(self, **how: Any) -> Any:
            return pipe

    images = PipelineSampler(
        ServablePipeline(Folder(folder.path, folder.class_name, folder.parts)), ModelConfig()
    )
    images.use(images.make_plan(artifact, "1"))
    pictures = (plain_picture(SIDE, SIDE),) if pipeline.needs_pictures else ()
    rows = [ImageRequest("a cat", 1, i, size=(SIDE, SIDE), pictures=pictures) for i in range(2)]
    if images.shared_with(rows[0], images.champion) != images.shared_with(rows[1], images.champion):
        rows = rows[:1]
    planned = images.generate(rows)
    full = images.generate(rows, images.plan_for("high"))
    assert planned.isfinite().all() and full.isfinite().all(), "images"
    assert not torch.equal(planned, full), "a plan that reuses something"


def served(name: str, transformer: Any = None, artifact: RouterArtifact | None = None) -> str:
    """Return how a class is served, or why it is not.

    Args:
        transformer: a tiny instance, to draw with; None where no plan fits.
        artifact: a router of it.
    """
    found = {pipeline: folder_of(pipeline, name) for pipeline in pipelines_of().get(name, [])}
    folders = [each for each in found.values() if isinstance(each, ServablePipeline)]
    if not found:
        return "no pipeline"
    if None in found.values():
        return "by its branch file"
    if not folders:
        return f"refused: {str(next(iter(found.values()))).partition(':')[0].removeprefix('a ')}"
    folder = min(folders, key=lambda each: (each.needs_pictures, len(each.class_name)))
    override = OVERRIDES.get(folder.class_name, {})
    if why := override.get("not_tried"):
        return f"not tried: {folder.class_name}, {why}"
    if transformer is None or artifact is None:
        return ""
    draw(folder, transformer, artifact)
    return folder.class_name + override.get("note", "")
