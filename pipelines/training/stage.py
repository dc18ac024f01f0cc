"""Train routers on Ray Train V2, resumable.

Rows come from Ray Data; checkpoints go to the run's storage and metrics to MLflow.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray.data
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer

from harmonica.core.artifact import RouterArtifact
from harmonica.data.batch import Batch
from harmonica.data.samples import SampleSpec, Shard
from harmonica.models.loading import load_model
from harmonica.samplers import make_sampler
from harmonica.training.multi_target import MultiTargetTrainer, all_phase_budgets
from harmonica.training.progress import Progress
from harmonica.training.sharding import shard_weights
from harmonica.validation.finite import NotFinite

from ..config.workflow import WorkflowConfig
from ..data.stream import sample_spec, stream_samples
from ..run_state.resume import work_folder
from ..run_state.storage import RunStorage
from ..runtime.log_filters import drop_remarks
from ..runtime.ray_runtime import quiet_libraries
from ..tracking.mlflow_runs import StageRun
from ..tracking.worker_times import WorkerTimes, worker_nodes
from .checkpoints import Checkpoints
from .run_recorder import UNLOGGED_METRICS, RunRecorder
from .watchdog import make_board, run_watched

logger = logging.getLogger(__name__)

Routers = tuple[RouterArtifact, dict[str, RouterArtifact]]

# Training does not wait for MLflow: metrics that it did not take stay in the checkpoint (`MetricLog`).
_MLFLOW_CLIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
# Seconds that an elastic run waits for a node that is gone before it counts nodes again; Ray waits a minute.
_START_PATIENCE = ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")


def start_run(
    config: WorkflowConfig, device: torch.device, *, shard_model: bool = False
) -> tuple[MultiTargetTrainer, SampleSpec]:
    """Return a run at its first trajectory, and the spec of its rows."""
    model = load_model(config.model.for_training(), "cpu" if shard_model else device).model
    if shard_model:
        shard_weights(model)
    sampler = make_sampler(model, config.sampler)
    run = MultiTargetTrainer(sampler, config.train, seed=config.seed, device=device)
    return run, sample_spec(config, model, config.seed)


def _trajectories(
    run: MultiTargetTrainer, spec: SampleSpec, times: WorkerTimes, tell: Callable[[str], object]
) -> Iterator[Batch]:
    """Yield this worker's rows of every trajectory that is still to be trained."""
    context = ray.train.get_context()
    shard = Shard(run.config.batch_size, context.get_world_rank(), context.get_world_size())
    while wanted := run.next_trajectories:  # those of one target after another
        rows = stream_samples(spec, shard, first_trajectory=wanted.start, trajectories=len(wanted))
        batches = iter(rows.iter_batches(batch_size=shard.size, prefetch_batches=4, batch_format="numpy"))
        for _ in wanted:
            tell(f"rows of trajectory {run.trajectory}")
            with times.waiting_for_data():
                batch = spec.to_batch(next(batches), run.device)
            tell(f"trajectory {run.trajectory}, its updates and the other workers' gradients")
            yield batch


def _agree(due: bool, device: torch.device | str) -> bool:
    """Return rank 0's answer on all workers, since a report is a barrier."""
    flag = torch.tensor([float(due)], device=device)  # NCCL moves only what is on the GPU
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(flag, src=0)
    return bool(flag.item())


def _resume(run: MultiTargetTrainer, checkpoints: Checkpoints, is_rank_0: bool) -> list[Any]:
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


class _QuietController(ray.train.UserCallback):
    """Keep Ray's remarks away in the process of Ray Train's controller.

    It is made anew there.
    """

    def __init__(self) -> None:
        drop_remarks()

    def __reduce__(self) -> tuple[type["_QuietController"], tuple[()]]:
        return _QuietController, ()


def _train_loop(job: dict[str, Any]) -> None:
    config: WorkflowConfig = job["config"]
    quiet_libraries()
    for name, value in _MLFLOW_CLIENT.items():
        os.environ.setdefault(name, value)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rank = ray.train.get_context().get_world_rank()

    def tell(doing: str) -> None:
        job["board"].tell.remote(rank, doing)

    tell("the model")
    device, shard_model = ray.train.torch.get_device(), config.train.shard_model
    run, spec = start_run(config, device, shard_model=shard_model)
    checkpoints = Checkpoints.of_training(RunStorage(config.storage_path, config.run_id, patient=True))
    pending = _resume(run, checkpoints, rank == 0)
    recorder = RunRecorder(checkpoints, run, job["mlflow"], job["board"], pending) if rank == 0 else None
    nodes = worker_nodes(run.device)
    if recorder is not None:
        recorder.say_where(nodes)
    times, last_checkpoint = WorkerTimes(), time.monotonic()
    for batch in _trajectories(run, spec, times, tell):
        try:
            metrics = run.train_one(batch)
        except NotFinite as error:  # on all workers; raised, it would be tried again with the same outcome
            ray.get(job["board"].stop.remote(str(error)))
            return
        times.add(metrics)
        is_last = run.trajectory == config.train.all_trajectories
        is_due = time.monotonic() - last_checkpoint > config.train.checkpoint_interval_s
        if is_kept := _agree(is_last or is_due, run.device):
            metrics |= times.gather(rank)
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


def train(config: WorkflowConfig, storage: RunStorage, stage: StageRun) -> Routers:
    """Train the routers and return them, resuming the run's last checkpoint.

    Training ends at `config.train.all_trajectories`. The router of `train.target_speedup` is first, then come
    those of `train.targets` by name, as in "1.5x".

    Raises:
        RuntimeError: workers failed more often than `train.max_failures`; says how the last one did.
        NotFinite: what is computed is not finite; the last checkpoint is from before.
        TimeoutError: nothing went on for `train.stall_timeout_s`; says what it waited for.
    """
    settings = config.train
    config = dataclasses.replace(config, storage_path=storage.root)  # workers run in folders of their own
    workers: int | tuple[int, int] = settings.num_workers
    if settings.min_workers:
        workers = (settings.min_workers, settings.num_workers)
        os.environ.setdefault(*_START_PATIENCE)
    board = make_board()
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={"config": config, "mlflow": stage, "board": board},
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
            callbacks=[_QuietController()],  # type: ignore[list-item]
        ),
    )
    kind = "GPU" if settings.use_gpu else "CPU"
    wanted = f"{settings.counts[0]} workers of one {kind} each, {settings.placement_strategy}"
    progress = Progress(all_phase_budgets(settings, config.sampler.num_inference_steps))
    try:
        run_watched(trainer.fit, board, settings.stall_timeout_s, wanted, progress)
    except WorkerGroupError as error:
        raise RuntimeError(_last_failure(error, settings.max_failures)) from error
    if message := ray.get(board.why_stopped.remote()):
        raise NotFinite(message)
    return _build_artifacts(config, Checkpoints.of_training(storage))


def _last_failure(error: WorkerGroupError, max_failures: int) -> str:
    each = {f"rank {rank}: {str(cause).strip()}" for rank, cause in error.worker_failures.items()}
    return f"training failed more than train.max_failures ({max_failures}) times, at last\n" + "\n".join(
        sorted(each)
    )


def _build_artifacts(config: WorkflowConfig, checkpoints: Checkpoints) -> Routers:
    run, _ = start_run(config, torch.device("cpu"))
    name = checkpoints.last()
    if name:
        run.load_state(checkpoints.load(name))
    if run.trajectory < config.train.all_trajectories:
        raise RuntimeError(
            f"training of {config.run_id} ended and its last whole checkpoint is of trajectory "
            f"{run.trajectory} of {config.train.all_trajectories}: run again with the same run id"
        )
    settings = {"run_id": config.run_id} | config.to_dict()["train"]
    return run.artifact(**settings), run.extra_artifacts(**settings)
