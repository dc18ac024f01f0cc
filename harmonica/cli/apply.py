"""Sample from a diffusers pipeline with and without a plan, timed.

Both runs begin from the same noise.

    harmonica apply --pipeline PIPELINE --speedup 1.8 --prompts "a harmonica on a table"
    harmonica apply --pipeline PIPELINE --router ROUTER --prompts "a harmonica on a table"

PIPELINE is the folder of a diffusers pipeline, ROUTER an artifact folder that was trained for its
transformer; a speed in its place needs no training (`harmonica.EvenSteps`). The pipeline keeps its own
scheduler; steps, guidance and size are the router's, or those that are given. Printed are the seconds of
both, the speed, and how near the images are; of videos, all their frames.
"""

import statistics
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from harmonica.cli.common import fail, parse_settings, say
from harmonica.cli.train import pick_device
from harmonica.core.artifact import RouterArtifact
from harmonica.integrations.diffusers_pipeline import apply, even_speedup, remove
from harmonica.integrations.recorded.compiled_units import compile_blocks
from harmonica.integrations.recorded.even_steps import EvenSteps
from harmonica.integrations.recorded.pipelines import is_recorded, transformers_of
from harmonica.io.paths import local
from harmonica.samplers.noise import MAX_SEED
from harmonica.torchvision_ops import ensure_torchvision_imports
from harmonica.validation.extras import need
from harmonica.validation.settings import Count, Cure, Field, SettingError, require, settings

_OUR_OWN = ("output_type", "return_dict")
"""Arguments of a pipeline's call that are not a router's."""


@settings()
class ApplyCommand:
    """Settings of one comparison."""

    pipeline: str = ""
    """Folder of a diffusers pipeline with a supported transformer."""
    router: str = ""
    """Artifact folder of a router that was trained for this transformer."""
    speedup: Annotated[float, Field(ge=0)] = 0.0
    """In place of a router: how many times less arithmetic evenly spread steps do, without training."""
    num_inference_steps: Annotated[int, Field(ge=0)] = 0
    """With `speedup`: number of steps; 0 leaves it to the pipeline. A router has its own."""
    guidance_scale: Annotated[float, Field(ge=0)] = 0.0
    """With `speedup`: guidance of both runs; 0 leaves it to the pipeline. A router has its own."""
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
    execution: Literal["eager", "compiled"] = "eager"
    """compiled runs each block as a graph of torch.compile, with the plan and without."""
    rounds: Count = 1
    """Number of timed runs of each, of which the median is taken; with 2 or more one goes before that is not
    timed."""
    output: Path = Path("applied.png")
    """Picture to write: the first row plain, the second under the plan."""


def run(command: ApplyCommand) -> Path:
    """Sample with and without the plan, and write the images.

    How fast both are is said, and how near their images.

    Raises:
        ValueError: a setting is refused, or the plan does not fit the pipeline.
    """
    device = pick_device(command.device)
    if not command.pipeline or not (local(command.pipeline, "pipeline") / "model_index.json").is_file():
        raise SettingError(f"pipeline is {command.pipeline!r}: give the folder that holds model_index.json")
    if bool(command.router) == bool(command.speedup):
        raise SettingError(
            f"router is {command.router!r} and speedup {command.speedup:g}: give the artifact folder of a "
            "router, or a speed such as 1.8 that needs none"
        )
    if bool(command.prompts) == bool(command.classes):
        raise SettingError(
            f"prompts is {command.prompts!r} and classes {command.classes!r}: give the one that the "
            "pipeline takes"
        )
    plan, call = _plan_and_call(command)
    need("diffusers", extra="diffusers")
    ensure_torchvision_imports()
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        str(local(command.pipeline, "pipeline")),
        dtype=getattr(torch, command.dtype),
        local_files_only=True,
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    if command.execution == "compiled":
        for transformer in transformers_of(pipe):
            compile_blocks(transformer)
    plain, plain_s = _sample_row(pipe, command, call, "plain")
    apply(pipe, plan, allow_other_sampler=command.allow_other_sampler)
    planned, planned_s = _sample_row(pipe, command, call, "plan")
    ideal = even_speedup(pipe) if isinstance(plan, EvenSteps) else plan.ideal_speedup
    how = "even steps" if isinstance(plan, EvenSteps) else plan.method
    say(f"{plain_s / planned_s:.2f}x as fast; ideal speedup {ideal:.2f}x, {how}")
    say(f"{_psnr(planned, plain):.1f} dB PSNR from the plain images, mean of {sum(map(len, plain))}")
    if command.rounds == 1:
        say("the first run of each is slower, and of a plan without training by two forwards: see --rounds 3")
    remove(pipe)
    output = local(command.output, "output")
    _write([plain, planned], output)
    say(f"pictures in {output}")
    return output


def _plan_and_call(command: ApplyCommand) -> tuple[RouterArtifact | EvenSteps, dict[str, Any]]:
    """Return the plan, and the arguments of the pipeline's calls that go with it."""
    given = {"num_inference_steps": command.num_inference_steps, "guidance_scale": command.guidance_scale}
    if not command.router:
        return EvenSteps(speedup=command.speedup), {name: value for name, value in given.items() if value}
    for name, value in given.items():
        require(not value, name, value, "leave it out, since the router has its own")
    artifact = RouterArtifact.load(command.router)
    if is_recorded(artifact):  # what the pipeline was called with, which need not name guidance
        arguments = artifact.training.get("call", {}).get("arguments", {})
        steps = {"num_inference_steps": artifact.sampler.num_inference_steps}
        return artifact, steps | {name: each for name, each in arguments.items() if name not in _OUR_OWN}
    return artifact, {name: getattr(artifact.sampler, name) for name in given}


def _sample_row(
    pipe: Any, command: ApplyCommand, call: dict[str, Any], way: str
) -> tuple[list[list[Any]], float]:
    """Sample the images or videos of one row, and say how many seconds they took.

    Returns the frames of each, of which an image has one, and the seconds.
    """
    subjects: Any = list(command.prompts or command.classes)

    def sample() -> list[list[Any]]:
        generator = torch.Generator().manual_seed(command.seed)
        output = pipe(subjects, generator=generator, output_type="pil", **call)
        if hasattr(output, "images"):
            return [[image] for image in output.images]
        if hasattr(output, "frames"):
            return [list(video) for video in output.frames]
        raise SettingError(f"pipeline is a {type(pipe).__name__}: give one that makes images or videos")

    if command.rounds > 1:
        sample()
    seconds = []
    for _ in range(command.rounds):
        started = time.perf_counter()
        images = sample()
        seconds.append(time.perf_counter() - started)
    median_s = statistics.median(seconds)
    say(f"{way:5} {median_s:.3f} s for {len(images)} {'videos' if len(images[0]) > 1 else 'images'}")
    return images, median_s


def _psnr(images: list[list[Any]], reference: list[list[Any]]) -> float:
    """Return the mean PSNR in dB between all frames of two rows.

    It is infinite for equal ones.
    """
    pairs = zip(chain.from_iterable(images), chain.from_iterable(reference), strict=True)
    changes = [np.asarray(one, float) - np.asarray(other, float) for one, other in pairs]
    with np.errstate(divide="ignore"):
        return float(np.mean([10 * np.log10(255**2 / np.square(each).mean()) for each in changes]))


def _write(rows: list[list[list[Any]]], output: Path) -> None:
    """Write the rows below one another.

    Of a video it is the frame in the middle.
    """
    from PIL import Image

    shown = [[frames[len(frames) // 2] for frames in row] for row in rows]
    pixels = [np.concatenate([np.asarray(image) for image in row], axis=1) for row in shown]
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
