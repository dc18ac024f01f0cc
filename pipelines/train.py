"""Router training on Ray Train V2: rows by Ray Data, checkpoints, metrics to MLflow, resumable."""

import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.data
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.experimental import tqdm_ray
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from harmonica.artifact import RouterArtifact
from harmonica.models.loading import load_model
from harmonica.pictures import router_heat_map
from harmonica.rows import Batch, RowSpec, Share
from harmonica.samplers import make_sampler
from harmonica.sharding import shard
from harmonica.training import RouterRun
from pipelines.config import WorkflowConfig
from pipelines.runtime import quiet_libraries
from pipelines.storage import RunStorage
from pipelines.stream import row_spec, stream_rows
from pipelines.tracking import StageRun

logger = logging.getLogger(__name__)

_STATE = "state.pt"


@dataclass
class _Log:
    """Rank 0's metrics since the last checkpoint: logged with it, so a replayed step is logged once."""

    run: StageRun
    pending: list[tuple[int, dict[str, float]]]

    def flush(self, state: RouterRun) -> None:
        self.run.log_many(self.pending)
        self.pending.clear()
        names = [branch.name for branch in state.sampler.model.branches]
        plan = state.router.plan(state.config.sdt.threshold)
        figure = router_heat_map(state.router.logits().sigmoid().cpu(), plan.to_tensor(), names)
        path = f"router/trajectory_{state.trajectory:06d}.png"
        self.run.client.log_figure(self.run.mlflow_run_id, figure, path)


def start_run(
    config: WorkflowConfig, device: torch.device, *, shard_model: bool = False
) -> tuple[RouterRun, RowSpec]:
    """A run at its first trajectory, and what its rows look like."""
    model = load_model(config.model, "cpu" if shard_model else device).model
    if shard_model:
        shard(model)
    sampler = make_sampler(model, config.sampler)
    run = RouterRun(sampler, config.train, seed=config.seed, device=device)
    return run, row_spec(config, model, config.seed)


def _trajectories(run: RouterRun, spec: RowSpec) -> Iterator[Batch]:
    """This worker's rows of every trajectory still to train."""
    context = ray.train.get_context()
    share = Share(run.config.batch_size, context.get_world_rank(), context.get_world_size())
    remaining = run.config.trajectories - run.trajectory
    if remaining <= 0:
        return
    rows = stream_rows(spec, share, first_trajectory=run.trajectory, trajectories=remaining)
    for batch in rows.iter_batches(batch_size=share.size, prefetch_batches=4, batch_format="numpy"):
        yield Batch.of(batch, spec, run.device)


def _agree(due: bool, device: torch.device | str) -> bool:
    """Rank 0's clock decides for all: a report is a barrier."""
    flag = torch.tensor([float(due)], device=device)  # NCCL moves nothing that is not on the GPU
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(flag, src=0)
    return bool(flag.item())


def _report(run: RouterRun, metrics: dict[str, float], log: _Log | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if log is not None:
            log.flush(run)
            torch.save(run.state(), Path(folder) / _STATE)
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report(metrics | {"trajectory": run.trajectory}, checkpoint=checkpoint)


def _train_loop(job: dict[str, Any]) -> None:
    config: WorkflowConfig = job["config"]
    quiet_libraries()
    ray.data.DataContext.get_current().enable_progress_bars = False  # the training bar is the one to see
    device, shard_model = ray.train.torch.get_device(), config.train.shard_model
    run, spec = start_run(config, device, shard_model=shard_model)
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            run.load_state(torch.load(Path(folder) / _STATE, weights_only=True, map_location=run.device))
        logger.info("resumed after trajectory %d", run.trajectory)
    is_rank_0 = ray.train.get_context().get_world_rank() == 0
    log = _Log(job["mlflow"], []) if is_rank_0 else None
    total = config.train.trajectories
    bar = tqdm_ray.tqdm(total=total, desc="train router", position=0) if is_rank_0 else None
    if bar is not None:
        bar.update(run.trajectory)
    last_checkpoint = time.monotonic()
    for rows in _trajectories(run, spec):
        metrics = run.train_one(rows.noise_NCHW, rows.condition_N, rows.keys)
        if log is not None and bar is not None:
            log.pending.append((run.trajectory, metrics))
            bar.update(1)
        is_last = run.trajectory == total
        is_due = time.monotonic() - last_checkpoint > config.train.checkpoint_interval_s
        if _agree(is_last or is_due, run.device):
            _report(run, metrics, log)
            last_checkpoint = time.monotonic()
    if bar is not None:
        bar.close()


def train(config: WorkflowConfig, storage: RunStorage, stage: StageRun) -> RouterArtifact:
    """Train to `config.train.trajectories`, resuming the run's last checkpoint; returns the router."""
    settings = config.train
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={"config": config, "mlflow": stage},
        scaling_config=ScalingConfig(num_workers=settings.num_workers, use_gpu=settings.use_gpu),
        run_config=RunConfig(  # type: ignore[call-arg]  # ray.train's stubs still show the V1 class
            name="train",
            storage_path=storage.uri(),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    result = trainer.fit()
    if result.checkpoint is None:
        raise RuntimeError(f"training of {config.run_id} ended without a checkpoint under {storage.uri()}")
    return _build_artifact(config, result.checkpoint)


def _build_artifact(config: WorkflowConfig, checkpoint: Checkpoint) -> RouterArtifact:
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / _STATE, weights_only=True, map_location="cpu")
    run, _ = start_run(config, torch.device("cpu"))
    run.load_state(state)
    return run.artifact(run_id=config.run_id, **config.to_dict()["train"])
