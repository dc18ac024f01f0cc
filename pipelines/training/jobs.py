"""Define what a worker of the stage train trains, of either kind of model.

There are two kinds: `BranchedJob` trains a model with a branch file on streamed rows; `PipelineJob` trains in
the loop of a diffusers pipeline, which makes its noise itself. Both train for one target or several.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch

from harmonica.core.artifact import RouterArtifact
from harmonica.core.plan import Plan
from harmonica.core.router import Router
from harmonica.data.batch import Batch
from harmonica.data.samples import SampleSpec, Shard
from harmonica.models.loading import load_model
from harmonica.samplers import make_sampler
from harmonica.training.multi_target import MultiTargetTrainer, target_name
from harmonica.training.progress import Progress
from harmonica.training.sharding import shard_weights

from ..config.workflow import WorkflowConfig
from ..data.stream import sample_spec, stream_samples
from ..run_state.resume import ROUTER, work_folder
from ..run_state.routers import load_router
from ..run_state.storage import RunStorage
from ..tracking.worker_times import WorkerTimes
from .checkpoints import Checkpoints

Routers = tuple[RouterArtifact, dict[str, RouterArtifact]]
Tell = Callable[[str], object]


class TrainingRun(Protocol):
    """The trainer as the stage sees it."""

    @property
    def trajectory(self) -> int: ...
    @property
    def router(self) -> Router: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def sampler(self) -> Any: ...
    @property
    def all_trajectories(self) -> int: ...
    @property
    def progress(self) -> Progress: ...
    @property
    def announcement(self) -> str: ...
    @property
    def device(self) -> torch.device | str: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...


class TrainingJob(ABC):
    """A training on one worker."""

    run: TrainingRun

    @abstractmethod
    def prepare(self, shard: Shard) -> None:
        """Measure what `train.speed` and `train.budget` need, unless it is measured.

        Raises:
            SettingError: the speed or the budget is out of reach; on all workers alike.
        """

    @abstractmethod
    def trained(self, shard: Shard, times: WorkerTimes, tell: Tell) -> Iterator[dict[str, float]]:
        """Train every trajectory still to do, and yield its metrics.

        Raises:
            NotFinite: what is computed is not finite, on all workers alike.
        """

    @abstractmethod
    def leave(self, config: WorkflowConfig, storage: RunStorage) -> None:
        """Leave on the storage what the driver cannot make of the last checkpoint.

        One worker alone does.
        """


class BranchedJob(TrainingJob):
    """A training of a model with a branch file."""

    run: MultiTargetTrainer

    def __init__(self, run: MultiTargetTrainer, spec: SampleSpec) -> None:
        self.run, self.spec = run, spec

    def prepare(self, shard: Shard) -> None:
        self.run.prepare(self.spec.batch_of(0, shard, self.run.device))

    def trained(self, shard: Shard, times: WorkerTimes, tell: Tell) -> Iterator[dict[str, float]]:
        for batch in self._batches(shard, times, tell):
            yield self.run.train_one(batch)

    def leave(self, config: WorkflowConfig, storage: RunStorage) -> None:
        pass

    def _batches(self, shard: Shard, times: WorkerTimes, tell: Tell) -> Iterator[Batch]:
        """Yield this worker's rows of every trajectory still to train."""
        run = self.run
        while wanted := run.next_trajectories:  # those of one target after another
            rows = stream_samples(self.spec, shard, first_trajectory=wanted.start, trajectories=len(wanted))
            batches = iter(rows.iter_batches(batch_size=shard.size, prefetch_batches=4, batch_format="numpy"))
            trainer = run.current
            for _ in wanted:
                if run.current is not trainer or not run.next_trajectories:
                    break  # a budget has taken some away since
                tell(f"rows of trajectory {run.trajectory}")
                with times.waiting_for_data():
                    batch = self.spec.to_batch(next(batches), run.device)
                tell(f"trajectory {run.trajectory}, its updates and the other workers' gradients")
                yield batch


class PipelineJob(TrainingJob):
    """A training in the loop of a diffusers pipeline."""

    def __init__(self, run: Any) -> None:
        """Train by a `PipelineTrainer` whose pipeline is recorded."""
        self.trainer = self.run = run

    def prepare(self, shard: Shard) -> None:
        self.trainer.prepare()

    def trained(self, shard: Shard, times: WorkerTimes, tell: Tell) -> Iterator[dict[str, float]]:
        while self.trainer.next_trajectories:
            tell(f"trajectory {self.run.trajectory}, its updates and the other workers' gradients")
            yield self.trainer.train_one()

    def leave(self, config: WorkflowConfig, storage: RunStorage) -> None:
        """Leave the routers: to make them of a checkpoint takes the whole pipeline."""
        said = provenance(config)
        others = self.trainer.extra_artifacts(**said)
        with TemporaryDirectory() as folder:
            for name, artifact in {**others, ROUTER: self.trainer.artifact(**said)}.items():
                storage.upload_folder(artifact.save(Path(folder) / name), _left(storage, name))


def start_run(
    config: WorkflowConfig, device: torch.device, *, shard_model: bool = False
) -> tuple[MultiTargetTrainer, SampleSpec]:
    """A run at its first trajectory, and what its rows look like."""
    model = load_model(config.model.for_training(), "cpu" if shard_model else device).model
    if shard_model:
        shard_weights(model)
    sampler = make_sampler(model, config.sampler)
    run = MultiTargetTrainer(sampler, config.train, seed=config.seed, device=device)
    return run, sample_spec(config, model, config.seed)


@contextmanager
def opened_job(config: WorkflowConfig, device: torch.device, shard: Shard) -> Iterator[TrainingJob]:
    """Yield the training of the configured model at its first trajectory.

    Raises:
        ValueError: the model cannot be loaded, or trained for the target.
    """
    if not config.pipeline.enabled:
        yield BranchedJob(*start_run(config, device, shard_model=config.train.shard_model))
        return
    # Here, since diffusers' pipelines take seconds to import.
    from harmonica.integrations.pipeline_folder import PipelineFolder
    from harmonica.pipeline_training.trainer import PipelineTrainer

    from ..data.pipeline_prompts import open_prompts, pipeline_call

    folder = PipelineFolder.read(config.model.path, config.model.revision)
    prompts = open_prompts(config)
    pipe = folder.load_denoiser(
        dtype=getattr(torch, config.model.dtype), device=device, embedded=bool(prompts.manifest.names)
    )
    trainer = PipelineTrainer(
        pipe,
        prompts,
        config.train,
        call=pipeline_call(config, folder),
        seed=config.seed,
        cacheable=config.pipeline.cacheable,
        shard=shard,
    )
    with trainer:
        yield PipelineJob(trainer)


def provenance(config: WorkflowConfig) -> dict[str, Any]:
    """Return what a router records of its run."""
    settings: dict[str, Any] = config.to_dict()["train"]
    return {"run_id": config.run_id} | settings


def _left(storage: RunStorage, name: str) -> str:
    return f"{work_folder('train', storage)}/{name}"


def build_artifacts(config: WorkflowConfig, storage: RunStorage) -> Routers:
    """Return a finished training's routers: the main target's, others by name.

    Raises:
        RuntimeError: its last whole checkpoint is of an earlier trajectory.
    """
    if config.pipeline.enabled:
        names = map(target_name, config.train.extra_targets)
        family = {name: load_router(storage, _left(storage, name)) for name in names}
        return load_router(storage, _left(storage, ROUTER)), family
    checkpoints = Checkpoints.of_training(storage)
    run, _ = start_run(config, torch.device("cpu"))
    name = checkpoints.last()
    if name:
        run.load_state(checkpoints.load(name))
    if run.trajectory < run.all_trajectories:
        raise RuntimeError(
            f"training of {config.run_id} ended and its last whole checkpoint is of trajectory "
            f"{run.trajectory} of {run.all_trajectories}: run again with the same run id"
        )
    return run.artifact(**provenance(config)), run.extra_artifacts(**provenance(config))
