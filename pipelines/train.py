"""Router training on Ray Train V2: frozen model, B router gradients a step across workers, resumable."""

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
from torch import Tensor

from harmonica.artifact import RouterArtifact
from harmonica.beta import BetaController
from harmonica.iepo import image_error_proxy
from harmonica.models.loading import load_model
from harmonica.pictures import router_heat_map
from harmonica.router import Router
from harmonica.samplers import Ddim
from harmonica.sdt import SdtTrainer
from pipelines.config import WorkflowConfig
from pipelines.runtime import quiet_libraries
from pipelines.storage import RunStorage
from pipelines.stream import RowSpec, Share, stream_rows
from pipelines.tracking import StageRun

logger = logging.getLogger(__name__)

_STATE = "state.pt"


def _average(tensor: Tensor) -> None:
    """Mean over all workers, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()


class RouterRun:
    """What one worker holds: trainer, lambda, beta and position; all of it goes into a checkpoint."""

    def __init__(self, config: WorkflowConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        loaded = load_model(config.model)
        self.sampler = Ddim(loaded.model.to(device), config.sampler)
        self.num_classes = loaded.model.num_classes
        settings, shape = config.train, (self.sampler.num_steps, len(loaded.model.branches))
        make_router = Router.alternating if settings.initial == "alternate" else Router
        router = make_router(*shape, settings.initial_logit).to(device)
        self.trainer = SdtTrainer(self.sampler, router, config.train.sdt)
        self.lambda_T = torch.ones(self.sampler.num_steps - 1, device=device)
        self.beta = (
            None
            if settings.target_cur == 0
            else BetaController(*shape, target_cur=settings.target_cur, threshold=settings.sdt.threshold)
        )
        self.trajectory = 0

    @property
    def router(self) -> Router:
        return self.trainer.router

    def state(self) -> dict[str, Any]:
        return {
            "router": self.router.state_dict(),
            "optimizer": self.trainer.optimizer.state_dict(),
            "lambda": self.lambda_T,
            "beta": self.beta.state_dict() if self.beta else None,
            "trajectory": self.trajectory,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.router.load_state_dict(state["router"])
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        self.lambda_T = state["lambda"].to(self.device)
        self.trajectory = state["trajectory"]
        if self.beta:
            self.beta.load_state_dict(state["beta"])

    @property
    def beta_now(self) -> float:
        """As configured, or what the target asks for at this point."""
        return self.beta.beta if self.beta else self.config.train.sdt.beta

    def _observe(self, i: int, gradient_B: Tensor) -> None:
        if self.beta:
            self.beta.observe(i, gradient_B, self.router.rows[i])

    def train_one(self, noise: Tensor, label: Tensor) -> dict[str, float]:
        """One trajectory, after a refresh of lambda where it is due; the metrics to log."""
        settings = self.config.train
        started = time.monotonic()
        metrics = {}
        if settings.iepo != "none" and self.trajectory % settings.iepo_every == 0:
            self.lambda_T = image_error_proxy(
                self.sampler,
                self.router,
                noise,
                label,
                kind=settings.iepo,
                threshold=settings.sdt.threshold,
                reuse=settings.sdt.reuse,
                average=_average,
            )
            metrics = {f"lambda.step_{i:03d}": value for i, value in enumerate(self.lambda_T.tolist())}
        records, _ = self.trainer.train_trajectory(
            noise,
            label,
            self.lambda_T,
            beta=self.beta_now,
            average=_average,
            on_gradient=self._observe,
        )
        self.trajectory += 1
        cur = self.router.plan(settings.sdt.threshold).cur
        means = torch.tensor([[r.loss, r.mse, r.l1] for r in records], device=self.device).mean(0)
        _average(means)
        metrics |= dict(zip(("loss", "mse", "l1"), means.tolist(), strict=True))
        metrics |= {"cur": cur, "beta": self.beta_now}
        metrics["updates_per_s"] = len(records) / (time.monotonic() - started)
        if self.beta:
            self.beta.update()
        return metrics


@dataclass
class _Log:
    """Rank 0's metrics since the last checkpoint: logged with it, so a replayed step is logged once."""

    run: StageRun
    pending: list[tuple[int, dict[str, float]]]

    def flush(self, state: RouterRun) -> None:
        self.run.log_many(self.pending)
        self.pending.clear()
        names = [branch.name for branch in state.sampler.model.branches]
        plan = state.router.plan(state.config.train.sdt.threshold)
        figure = router_heat_map(state.router.logits().sigmoid().cpu(), plan.to_tensor(), names)
        path = f"router/trajectory_{state.trajectory:06d}.png"
        self.run.client.log_figure(self.run.mlflow_run_id, figure, path)


def _trajectories(run: RouterRun) -> Iterator[tuple[Tensor, Tensor]]:
    """(noise, label) of this worker's share of every trajectory still to train."""
    context, settings = ray.train.get_context(), run.config.train
    share = Share(settings.batch_size, context.get_world_rank(), context.get_world_size())
    spec = RowSpec.of(run.sampler.model, run.num_classes, run.config.seed)
    remaining = settings.trajectories - run.trajectory
    if remaining <= 0:
        return
    rows = stream_rows(spec, share, first_trajectory=run.trajectory, trajectories=remaining)
    for batch in rows.iter_torch_batches(batch_size=share.size, prefetch_batches=4, device=run.device):
        yield batch["noise"], batch["label"]


def _agree(due: bool, device: torch.device) -> bool:
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
    run = RouterRun(config, ray.train.torch.get_device())
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
    for noise, label in _trajectories(run):
        metrics = run.train_one(noise, label)
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
    run = RouterRun(config, torch.device("cpu"))
    run.load_state(state)
    training = {
        "run_id": config.run_id,
        "seed": config.seed,
        "trajectories": run.trajectory,
        "final_beta": run.beta_now,
        **config.to_dict()["train"],
    }
    return RouterArtifact.build(
        run.router.logits(),
        run.sampler,
        threshold=config.train.sdt.threshold,
        reuse=config.train.sdt.reuse,
        training=training,
    )
