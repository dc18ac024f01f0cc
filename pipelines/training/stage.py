"""Train routers on Ray Train V2, resumable.

Rows come from Ray Data; checkpoints go to the run's storage and metrics to MLflow.
"""

import dataclasses
import functools
import logging
import os
import time
from typing import Any

import ray.data
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError

from harmonica.data.samples import Shard
from harmonica.integrations.recorded.kinds import RefusedTransformer
from harmonica.training.budget import used_numbers
from harmonica.validation.finite import NotFinite
from harmonica.validation.settings import SettingError

from ..config.workflow import WorkflowConfig
from ..run_state.resume import work_folder
from ..run_state.storage import RunStorage
from ..runtime.ray_runtime import quiet_libraries
from ..tracking.mlflow_runs import StageRun
from ..tracking.worker_times import WorkerTimes, worker_nodes
from .checkpoints import Checkpoints
from .jobs import Routers, Tell, TrainingJob, TrainingRun, build_artifacts, opened_job
from .ray_trainer import QuietController, Trainer
from .run_recorder import UNLOGGED_METRICS, RunRecorder
from .watchdog import make_board, run_watched

logger = logging.getLogger(__name__)

# Training does not wait for MLflow: metrics that it did not take stay in the checkpoint (`MetricLog`).
_MLFLOW_CLIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
# Seconds that an elastic run waits for a node that is gone before it counts nodes again; Ray waits a minute.
_START_PATIENCE = ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")


def _agree(due: bool, device: torch.device | str) -> bool:
    """Return rank 0's answer on all workers, since a report is a barrier."""
    flag = torch.tensor([float(due)], device=device)  # NCCL moves only what is on the GPU
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(flag, src=0)
    return bool(flag.item())


def _resume(run: TrainingRun, checkpoints: Checkpoints, is_rank_0: bool) -> list[Any]:
    """Go on from the newest whole checkpoint; return its metrics not logged yet.

    All workers load the same checkpoint.
    """
    found = checkpoints.last() if is_rank_0 else None
    name: str = ray.train.collective.broadcast_from_rank_zero(found)
    if not name:
        return []
    state = checkpoints.load(name, run.device)
    run.load_state(state)
    logger.info("resumed after trajectory %d", run.trajectory)
    metrics: list[Any] = state[UNLOGGED_METRICS]
    return metrics


def _train_loop(job: dict[str, Any]) -> None:
    config: WorkflowConfig = job["config"]
    quiet_libraries()
    for name, value in _MLFLOW_CLIENT.items():
        os.environ.setdefault(name, value)
    ray.data.DataContext.get_current().enable_progress_bars = False
    context = ray.train.get_context()
    shard = Shard(config.train.batch_size, context.get_world_rank(), context.get_world_size())

    def tell(doing: str) -> None:
        job["board"].tell.remote(shard.rank, doing)

    tell("the model")
    try:
        with opened_job(config, ray.train.torch.get_device(), shard) as training:
            _train_to_the_end(training, config, shard, job, tell)
    except (NotFinite, RefusedTransformer, SettingError) as error:
        # On all workers; raised, it would be tried again with the same outcome.
        ray.get(job["board"].stop.remote(error))


def _train_to_the_end(
    training: TrainingJob, config: WorkflowConfig, shard: Shard, job: dict[str, Any], tell: Tell
) -> None:
    run, storage = training.run, RunStorage(config.storage_path, config.run_id, patient=True)
    checkpoints = Checkpoints.of_training(storage)
    is_first = shard.rank == 0
    pending = _resume(run, checkpoints, is_first)
    tell("what is measured first")
    training.prepare(shard)
    recorder = RunRecorder(checkpoints, run, job["mlflow"], job["board"], pending) if is_first else None
    nodes = worker_nodes(run.device)
    if recorder is not None:
        recorder.say_where(nodes)
    times, last_checkpoint = WorkerTimes(), time.monotonic()
    for metrics in training.trained(shard, times, tell):
        times.add(metrics)
        is_last = run.trajectory == run.all_trajectories
        is_due = time.monotonic() - last_checkpoint > config.train.checkpoint_interval_s
        if is_kept := _agree(is_last or is_due, run.device):
            metrics |= times.gather(shard.rank)
        if recorder is not None:
            recorder.add(metrics)
        if is_kept:
            tell(f"the checkpoint after trajectory {run.trajectory}")
            if recorder is not None:
                recorder.save()
            # Few metrics, since Ray Train keeps them all in memory; the rest is in MLflow.
            ray.train.report({"trajectory": run.trajectory, "loss": metrics["loss"], "cur": metrics["cur"]})
            last_checkpoint = time.monotonic()
    if recorder is not None:
        recorder.finish()
        training.leave(config, storage)


def train(config: WorkflowConfig, storage: RunStorage, stage: StageRun) -> Routers:
    """Train the routers and return them, resuming the run's last checkpoint.

    Training ends at the trajectories that are set, or that `train.budget` allows. The router of
    `train.target_speedup` is first, then come those of `train.targets` by name, as in "1.5x".

    Raises:
        RuntimeError: workers failed more often than `train.max_failures`; says how the last one did.
        NotFinite: what is computed is not finite; the last checkpoint is from before.
        ValueError: the model's transformer has no plan, or none of the target's speed.
        TimeoutError: nothing went on for `train.stall_timeout_s`; says what it waited for.
    """
    settings = config.train
    config = dataclasses.replace(config, storage_path=storage.root)  # workers run in folders of their own
    workers: int | tuple[int, int] = settings.num_workers
    if settings.min_workers:
        workers = (settings.min_workers, settings.num_workers)
        os.environ.setdefault(*_START_PATIENCE)
    board = make_board()
    job = {"config": config, "mlflow": stage, "board": board}
    trainer = Trainer(
        # Not as `train_loop_config`, which Ray Train's controller reads too, and imports for what is in it.
        functools.partial(_train_loop, job),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=settings.resize_interval_s,
            use_gpu=settings.use_gpu,
            placement_strategy=settings.placement_strategy,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # ray.train's stubs still show the V1 class
            name=work_folder("train", storage),
            storage_path=storage.uri(),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[QuietController()],  # type: ignore[list-item]
        ),
    )
    kind = "GPU" if settings.use_gpu else "CPU"
    wanted = f"{settings.counts[0]} workers of one {kind} each, {settings.placement_strategy}"
    try:
        run_watched(trainer.fit, board, settings.stall_timeout_s, wanted)
    except WorkerGroupError as error:
        raise RuntimeError(_last_failure(error, settings.max_failures)) from error
    if (stopped := ray.get(board.why_stopped.remote())) is not None:
        raise stopped
    routers = build_artifacts(config, storage)
    if settings.budget:
        log_numbers(stage, routers)
    return routers


def log_numbers(stage: StageRun, routers: Routers) -> None:
    """Log the numbers that a budget has chosen for each router, as parameters.

    Their names begin with `used`, as in `used.router_trajectories`; of another speed, as in `used.1.5x`.
    """
    main, family = routers
    used = {name: used_numbers(one.training) for name, one in family.items()}
    stage.log_params({"used": used_numbers(main.training) | used})


def _last_failure(error: WorkerGroupError, max_failures: int) -> str:
    each = {f"rank {rank}: {str(cause).strip()}" for rank, cause in error.worker_failures.items()}
    return f"training failed more than train.max_failures ({max_failures}) times, at last\n" + "\n".join(
        sorted(each)
    )
