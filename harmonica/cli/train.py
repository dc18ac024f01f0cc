"""Train a router on one machine, without Ray.

    python -m harmonica.cli.train                                             # the built-in model
    python -m harmonica.cli.train dit-xl-2-256-t10 --model.path DiT-XL-2-256x256.pt
    torchrun --nproc-per-node 4 -m harmonica.cli.train dit-xl-2-256-t10 --model.path ...
    python -m harmonica.cli.train PRESET --help                               # every setting

The output folder gets `router/` (the artifact), those of `train.targets` in `family/`, `router.png`,
`metrics.jsonl` and `state.pt`; the same command goes on from the last state.
"""

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist

from harmonica.cli.common import fail, parse, say
from harmonica.cli.training_folder import TrainingFolder
from harmonica.core.artifact import RouterArtifact
from harmonica.data.prompts import PromptStore
from harmonica.data.samples import SampleSpec, Shard
from harmonica.io.paths import shown_within
from harmonica.models.loading import ModelConfig, load_model
from harmonica.samplers import SamplerConfig, make_sampler, with_scheduler
from harmonica.samplers.noise import MAX_SEED
from harmonica.training.config import TrainingConfig
from harmonica.training.multi_target import MultiTargetTrainer
from harmonica.training.presets import RECIPES, Recipe
from harmonica.training.sharding import shard_weights
from harmonica.validation.finite import NotFinite
from harmonica.validation.settings import Cure, Field, settings

_SAY_EVERY_S = 5.0


@settings()
class TrainCommand:
    """Settings of one training."""

    output: Path = Path("router")
    """Folder for the router, its picture, the metrics and the state to resume from."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED), Cure("a whole number from 0, below 2^63")] = 0
    """Fixes every label, every noise and the initial logits."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one; torchrun gives each process its own."""
    prompts: str = ""
    """For a model that takes prompts: the store that `pipelines.data.embed_prompts` wrote."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The denoiser."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How it samples."""
    train: TrainingConfig = field(default_factory=TrainingConfig)
    """Objective, budget and batch."""


def pick_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return this process's device; under torchrun each has its own GPU."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device is cuda and torch finds no CUDA device: give cpu, or install torch for CUDA")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def _process_group(device: torch.device, batch_size: int) -> Iterator[Shard]:
    """Join torchrun's process group, if any, and yield this process's shard."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if batch_size % world_size:
        raise ValueError(f"train.batch_size is {batch_size}: give a multiple of the {world_size} processes")
    if "RANK" not in os.environ:
        yield Shard(batch_size)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Shard(batch_size, rank, world_size)
        dist.barrier()  # a process that leaves while another still communicates with it ends that one too
    finally:
        dist.destroy_process_group()


def _as_json(command: TrainCommand) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(shown_within(dataclasses.asdict(command)), default=str))
    return found


def train(command: TrainCommand, tell: Callable[[str], None] = say) -> RouterArtifact:
    """Train, or go on training; every process returns the router."""
    device = pick_device(command.device)
    folder = TrainingFolder(command.output, _as_json(command))
    folder.check(_as_json(TrainCommand()))
    with _process_group(device, command.train.batch_size) as shard:
        loaded = load_model(command.model.for_training(), "cpu" if command.train.shard_model else device)
        if command.train.shard_model:
            shard_weights(loaded.model)
        sampler = make_sampler(loaded.model, with_scheduler(command.sampler, loaded.scheduler))
        run = MultiTargetTrainer(sampler, command.train, seed=command.seed, device=device)
        folder.load(run)
        if shard.rank == 0:
            folder.mend(device)
        prompts = PromptStore(command.prompts) if command.prompts else None
        spec = SampleSpec.of(loaded.model, command.seed, prompts)
        _train(run, spec, shard, folder, tell if shard.rank == 0 else lambda _: None)
        if shard.rank != 0:
            return run.artifact()
        artifact = folder.finish(run)
    tell(f"router in {folder.path}: CUR {artifact.plan.cur:.1%}, ideal {artifact.ideal_speedup:.2f}x")
    return artifact


def trained(run: MultiTargetTrainer, spec: SampleSpec, shard: Shard) -> Iterator[dict[str, float]]:
    """Train the trajectories that are left, and yield the metrics of each.

    Their rows are made here.
    """
    while run.next_trajectories:
        yield run.train_one(spec.batch_of(run.next_trajectories.start, shard, run.device))


def _train(
    run: MultiTargetTrainer,
    spec: SampleSpec,
    shard: Shard,
    folder: TrainingFolder,
    tell: Callable[[str], None],
) -> None:
    config, last_said, last_saved = run.config, 0.0, time.monotonic()
    said = ""
    run.prepare(spec.batch_of(0, shard, run.device))
    since, began = run.trajectory, time.monotonic()
    if run.announcement:
        tell(said := run.announcement)
    for metrics in trained(run, spec, shard):
        is_last, now = run.trajectory == run.all_trajectories, time.monotonic()
        if run.announcement != said:
            tell(said := run.announcement)
        if is_last or now - last_said > _SAY_EVERY_S:
            shown = ("loss", "mse", "beta", "updates_per_s")
            told = "  ".join(f"{name} {metrics[name]:.3g}" for name in shown if name in metrics)
            left = run.progress.time_left_message(run.trajectory, since, now - began)
            tell(f"{run.progress.message(run.trajectory)}  CUR {metrics['cur']:.1%}  {told}  {left}")
            last_said = now
        if shard.rank == 0:  # the state is the same on every rank
            folder.log(run.trajectory, metrics)
            if is_last or now - last_saved > config.checkpoint_interval_s:
                folder.save(run)
                last_saved = now


def _preset(recipe: Callable[[], Recipe]) -> TrainCommand:
    parts = recipe()
    return TrainCommand(model=parts.model, sampler=parts.sampler, train=parts.train)


def main(arguments: list[str]) -> int:
    """Run the command and return the exit code.

    It is 0 when trained, 2 for unusable input, 1 if a computed value is not finite, and 130 if interrupted.
    """
    presets = {name: functools.partial(_preset, recipe) for name, recipe in RECIPES.items()}
    try:
        train(parse(arguments, presets, "python -m harmonica.cli.train"))
    except ValueError as error:
        return fail(error, code=2)
    except NotFinite as error:
        return fail(str(error), code=1)
    except KeyboardInterrupt:
        return fail("interrupted: the same command goes on from the last state", code=130)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
