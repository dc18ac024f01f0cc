"""Train a built-in denoiser with Ray Train.

The modules beside it say what is trained, and on what; the loop checkpoints, and resumes a run of the same
id. Batches, noise and captions are a pure function of (seed, step, rank).
"""

import dataclasses
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import Tensor

from harmonica.io.paths import local
from harmonica.validation.finite import NotFinite

from ..run_state.interruption import sigterm_raises
from ..runtime.ray_runtime import connect
from ..tracking.mlflow_runs import StageRun, stage_run
from .learning import Learner
from .task import PretrainConfig, Task

logger = logging.getLogger(__name__)

DATA = "Fashion-MNIST, 60,000 training images (Zalando Research, MIT licence)"
_LOG_STEPS = 20


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
