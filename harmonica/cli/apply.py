"""Sample from a diffusers pipeline with and without a router, timed.

Both runs begin from the same noise.

    harmonica apply --pipeline PIPELINE --router ROUTER --prompts "a harmonica on a table"

PIPELINE is the folder of a diffusers pipeline, ROUTER an artifact folder that was trained for its
transformer. The pipeline keeps its own scheduler; steps and guidance are the router's.
"""

import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from harmonica.cli.common import fail, parse_settings, say
from harmonica.cli.train import pick_device
from harmonica.core.artifact import RouterArtifact
from harmonica.integrations.diffusers_pipeline import apply, remove
from harmonica.io.paths import local
from harmonica.samplers.noise import MAX_SEED
from harmonica.torchvision_ops import ensure_torchvision_imports
from harmonica.validation.extras import need
from harmonica.validation.settings import Cure, Field, SettingError, require, settings


@settings()
class ApplyCommand:
    """Settings of one comparison."""

    pipeline: str = ""
    """Folder of a diffusers pipeline with a supported transformer."""
    router: str = ""
    """Artifact folder of a router that was trained for this transformer."""
    prompts: tuple[str, ...] = ()
    """For a pipeline that takes prompts: one an image."""
    classes: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """For a DiT's pipeline: numbers of classes, one an image."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED), Cure("a whole number from 0, below 2^63")] = 0
    """Fixes the noise of both runs."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the pipeline; the router recognises its weights in each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one."""
    allow_other_sampler: bool = False
    """Follow the plan by the count of steps under a scheduler that the router was not trained for."""
    output: Path = Path("applied.png")
    """Picture to write: the first row plain, the second under the router."""


def run(command: ApplyCommand) -> Path:
    """Sample with and without the router, and write the images.

    The seconds of each are reported.

    Raises:
        ValueError: a setting is refused, or the router does not fit the pipeline.
    """
    device = pick_device(command.device)
    if not command.pipeline or not (local(command.pipeline, "pipeline") / "model_index.json").is_file():
        raise SettingError(f"pipeline is {command.pipeline!r}: give the folder that holds model_index.json")
    require(bool(command.router), "router", command.router, "give the artifact folder of a router")
    if bool(command.prompts) == bool(command.classes):
        raise SettingError(
            f"prompts is {command.prompts!r} and classes {command.classes!r}: give the one that the "
            "pipeline takes"
        )
    artifact = RouterArtifact.load(command.router)
    need("diffusers", extra="diffusers")
    ensure_torchvision_imports()
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        str(local(command.pipeline, "pipeline")),
        torch_dtype=getattr(torch, command.dtype),
        local_files_only=True,
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    rows = [_sample_row(pipe, command, artifact, "plain")]
    apply(pipe.transformer, artifact, allow_other_sampler=command.allow_other_sampler)
    rows.append(_sample_row(pipe, command, artifact, "router"))
    remove(pipe.transformer)
    say(f"ideal speedup {artifact.ideal_speedup:.2f}x, {artifact.method}")
    output = local(command.output, "output")
    _write(rows, output)
    say(f"pictures in {output}")
    return output


def _sample_row(pipe: Any, command: ApplyCommand, artifact: RouterArtifact, way: str) -> list[Any]:
    """Sample the images of one row and say how many seconds they took."""
    subjects: Any = list(command.prompts or command.classes)
    started = time.perf_counter()
    images: list[Any] = pipe(
        subjects,
        generator=torch.Generator().manual_seed(command.seed),
        num_inference_steps=artifact.sampler.num_inference_steps,
        guidance_scale=artifact.sampler.guidance_scale,
    ).images
    say(f"{way:7} {time.perf_counter() - started:.3f} s for {len(images)} images")
    return images


def _write(rows: list[list[Any]], output: Path) -> None:
    """Write the rows of PIL images below one another."""
    from PIL import Image

    pixels = [np.concatenate([np.asarray(image) for image in row], axis=1) for row in rows]
    output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(pixels, axis=0)).save(output)


def main(arguments: list[str]) -> int:
    """Run the command; return 0 if it sampled, and 2 for unusable input."""
    try:
        run(parse_settings(ApplyCommand, arguments, "harmonica apply"))
    except ValueError as error:
        return fail(error, code=2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
