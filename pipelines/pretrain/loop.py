"""Train a built-in denoiser with Ray Train.

The modules beside it say what is trained, and on what; the loop checkpoints, and resumes a run of the same
id. Batches, noise and captions are a pure function of (seed, step, rank).
"""

import dataclasses
import logging
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import numpy as np
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import Tensor, nn

from harmonica.evaluation import fashion_mnist
from harmonica.io.paths import local
from harmonica.pretraining.learning import Learner, LearningConfig
from harmonica.validation.finite import NotFinite
from harmonica.validation.settings import Count, Field, Natural, Positive, settings

from ..run_state.interruption import sigterm_raises
from ..runtime.ray_runtime import connect
from ..tracking.mlflow_runs import StageRun, stage_run

logger = logging.getLogger(__name__)

DATA = "Fashion-MNIST, 60,000 training images (Zalando Research, MIT licence)"
_LOG_STEPS = 20


@settings()
class PretrainConfig(LearningConfig):
    """Settings with which a built-in denoiser is trained."""

    run_id: str = "fashion-dit"
    """Names the run; the same id resumes it."""
    storage_path: str = "runs/pretrain"
    """Folder that holds runs."""
    data_folder: str = str(fashion_mnist.DEFAULT_FOLDER)
    """Folder with the files of the images: the four of Fashion-MNIST, or the two archives of the emoji."""
    num_workers: Count = 2
    """Data-parallel workers, one core each."""
    use_gpu: bool = False
    """One GPU a worker."""
    batch_size: Count = 128
    """Global batch."""
    steps: Count = 4200
    """Optimiser steps in all."""
    decay_steps: Count = 1600
    """The last of them, over which the learning rate falls to zero."""
    warmup_steps: Count = 100
    """The first of them, over which it rises."""
    learning_rate: Positive = 2e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Of the blocks' matrices."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged weights, which are the ones kept."""
    condition_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of conditions replaced by the empty one, for guidance."""
    seed: Natural = 0
    """Fixes initial weights, batches, noise and timesteps."""
    compile: bool = True
    """torch.compile the denoiser."""
    bfloat16: bool = False
    """Multiply in bfloat16 (`torch.autocast`); weights and their averages stay in float32."""
    checkpoint_interval_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds between checkpoints."""
    export: str = ""
    """Write the last checkpoint's EMA weights to this folder instead of training."""


Config = TypeVar("Config", bound=PretrainConfig)


class Task(ABC, Generic[Config]):
    """A task for a denoiser on the images, with labels or with captions.

    The loop around it is the same for both.
    """

    def __init__(self, config: Config, images: np.ndarray, labels: np.ndarray) -> None:
        self.config, self.images, self.labels = config, images, labels

    @staticmethod
    def load(folder: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return images (rows, C, H, W) uint8 and labels (rows,) int64 to train on.

        Raises:
            FileNotFoundError: the folder does not hold them.
        """
        return fashion_mnist.load_fashion_mnist("train", folder)

    @abstractmethod
    def make_model(self) -> nn.Module:
        """Return the model with its initial weights."""

    @abstractmethod
    def loss(
        self,
        forward: Callable[..., Tensor],
        clean_NCHW: Tensor,
        rows: np.ndarray,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the loss of `forward` on the clean images of these rows.

        `forward` is the replicated model.
        """

    def batch(self, step: int, rank: int, world_size: int) -> tuple[np.ndarray, torch.Generator]:
        """Return a rank's rows of global batch `step`, and a generator for its noise.

        Both are a pure function of (seed, step, rank).
        """
        share = self.config.batch_size // world_size
        rng = np.random.Generator(np.random.Philox(key=self.config.seed, counter=[0, 0, 0, step]))
        rows = self.draw_rows(rng)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)) + rank)
        return rows[rank * share :][:share], generator

    def draw_rows(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the rows (batch,) of a global batch: each image is as likely."""
        return rng.integers(len(self.images), size=self.config.batch_size)


class _Progress:
    """Log the mean loss and the speed since the last line.

    Rank 0 alone writes them, to MLflow and to the log.
    """

    def __init__(self, metrics: StageRun, config: PretrainConfig) -> None:
        self.metrics, self.config = metrics, config
        self.losses: list[float] = []
        self.since = time.monotonic()

    def add(self, learner: Learner, factor: float, loss: float) -> None:
        self.losses.append(loss)
        if learner.step % _LOG_STEPS:
            return
        now, steps = time.monotonic(), len(self.losses)
        mean = sum(self.losses) / steps
        speed = steps * self.config.batch_size / (now - self.since)
        row = {"loss": mean, "learning_rate_factor": factor, "images_per_s": speed}
        self.metrics.log(row, step=learner.step)
        total = self.config.steps
        logger.info("step %d of %d, loss %.4f, %.0f images/s", learner.step, total, mean, speed)
        self.losses, self.since = [], now


def _report(learner: Learner, is_rank_0: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if is_rank_0:
            torch.save(learner.state_dict(), Path(folder) / "state.pt")
        checkpoint = Checkpoint.from_directory(folder) if is_rank_0 else None
        ray.train.report({"step": learner.step}, checkpoint=checkpoint)


def _train_loop(job: dict[str, Any]) -> None:
    config: PretrainConfig = job["config"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    images, labels = job["task"].load(local(config.data_folder, "data_folder"))
    task: Task[Any] = job["task"](config, images, labels)
    device = ray.train.torch.get_device()
    model = task.make_model().to(device)
    learner = Learner(model, config)
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            learner.load_state_dict(
                torch.load(Path(folder) / "state.pt", weights_only=True, map_location=device)
            )
    replica = ray.train.torch.prepare_model(model)
    predict = torch.compile(replica) if config.compile else replica

    def forward(*inputs: Tensor, **conditions: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
            predicted: Tensor = predict(*inputs, **conditions)
        return predicted.float()

    progress = _Progress(job["mlflow"], config) if rank == 0 else None
    last_checkpoint = time.monotonic()
    while learner.step < config.steps:
        rows, generator = task.batch(learner.step, rank, world_size)
        clean = (torch.from_numpy(images[rows]).float() / 127.5 - 1).to(device)
        loss, factor = task.loss(forward, clean, rows, generator), learner.factor
        learner.learn(loss)
        if progress:
            progress.add(learner, factor, loss.item())
        is_due = time.monotonic() - last_checkpoint > config.checkpoint_interval_s
        due = torch.tensor([float(is_due)], device=device)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(due, src=0)  # reports are barriers: all ranks or none
        if due.item() or learner.step == config.steps:
            last_checkpoint = time.monotonic()
            if not loss.isfinite():
                raise NotFinite(
                    f"the loss of step {learner.step} is {loss.item()}: give a smaller learning rate"
                )
            _report(learner, rank == 0)


@sigterm_raises()
def run(config: PretrainConfig, task: type[Task[Any]]) -> Checkpoint:
    """Train to `config.steps` and return the last checkpoint.

    A run id that has a checkpoint is resumed.
    """
    storage = str(local(config.storage_path, "storage_path"))
    task.load(local(config.data_folder, "data_folder"))  # fails here, not on a worker
    connect()
    with stage_run("pretrain", config.run_id, storage, dataclasses.asdict(config)) as mlflow_run:
        trainer = TorchTrainer(
            _train_loop,
            train_loop_config={"config": config, "task": task, "mlflow": mlflow_run},
            scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=config.use_gpu),
            run_config=RunConfig(
                name=config.run_id,
                storage_path=storage,
                failure_config=FailureConfig(max_failures=3),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )
        result = trainer.fit()
    if result.checkpoint is None:
        raise RuntimeError(f"run {config.run_id} left no checkpoint under {storage}")
    checkpoint: Checkpoint = result.checkpoint
    return checkpoint


def last_state(config: PretrainConfig) -> dict[str, Any]:
    """Return the content of the run's last checkpoint: a `Learner`'s state.

    Raises:
        ValueError: the run has no checkpoint yet.
    """
    folder = local(config.storage_path, "storage_path") / config.run_id
    checkpoints = sorted(folder.glob("checkpoint_*/state.pt"))
    if not checkpoints:
        raise ValueError(f"run_id {config.run_id} has no checkpoint under {folder.parent}: train it first")
    state: dict[str, Any] = torch.load(checkpoints[-1], weights_only=True, map_location="cpu")
    return state


def provenance(config: PretrainConfig, steps_done: int, data: str = DATA) -> dict[str, Any]:
    """Return an exported model's account of its data and its training."""
    own = {field.name for field in dataclasses.fields(PretrainConfig)}
    where = ("export", "data_folder", "storage_path")
    training = {name: value for name, value in dataclasses.asdict(config).items() if name in own}
    for name in where:
        training.pop(name)
    return {"data": data, "training": {**training, "steps_done": steps_done}}
