"""Train the built-in class-conditional DiT on Fashion-MNIST with Ray Train.

    python -m pipelines.pretrain --run-id fashion-dit --storage-path runs/pretrain
    python -m pipelines.pretrain --run-id fashion-dit --export harmonica/builtin/fashion-dit

The first command trains, checkpoints every minute and, given the same run id again, goes on where
it stopped; the second writes the EMA weights of the last checkpoint as the built-in model.
"""

import dataclasses
import logging
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
import tyro
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import save_file

from harmonica import fashion
from harmonica.models.dit import DiT, DiTConfig
from harmonica.models.loading import write_folder_config
from harmonica.pretraining import Ema, denoising_loss, learning_rate_factor, make_optimizers
from pipelines.runtime import connect
from pipelines.tracking import stage_run

logger = logging.getLogger(__name__)

FASHION_DIT = DiTConfig(
    sample_size=28,
    patch_size=4,
    in_channels=1,
    out_channels=1,
    num_layers=12,
    num_attention_heads=4,
    attention_head_dim=32,
    num_embeds_ada_norm=10,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """How the built-in denoiser is trained."""

    run_id: str = "fashion-dit"
    """Names the run; the same id resumes it."""
    storage_path: str = "runs/pretrain"
    """Folder that holds runs."""
    data_folder: str = str(fashion.DEFAULT_FOLDER)
    """Folder with the four IDX files of Fashion-MNIST."""
    model: DiTConfig = field(default_factory=lambda: FASHION_DIT)
    """Shape of the denoiser."""
    num_workers: int = 2
    """Data-parallel workers, one core each."""
    use_gpu: bool = False
    """One GPU a worker."""
    batch_size: int = 128
    """Global batch."""
    steps: int = 4200
    """Optimiser steps in all."""
    decay_steps: int = 1600
    """The last of them, over which the learning rate falls to zero."""
    warmup_steps: int = 100
    """The first of them, over which it rises."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Of the blocks' matrices."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null class, for guidance."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are the ones kept."""
    seed: int = 0
    """Fixes initial weights, batches, noise and timesteps."""
    compile: bool = True
    """torch.compile the denoiser."""
    checkpoint_interval_s: float = 60.0
    """Seconds between checkpoints."""
    export: str = ""
    """Write the last checkpoint's EMA weights to this folder instead of training."""


def _batch(images: np.ndarray, labels: np.ndarray, config: PretrainConfig, step: int) -> tuple:
    """This rank's slice of global batch `step`: a pure function of (seed, step)."""
    context = ray.train.get_context()
    share = config.batch_size // context.get_world_size()
    rng = np.random.Generator(np.random.Philox(key=config.seed, counter=[0, 0, 0, step]))
    rows = rng.integers(len(images), size=config.batch_size)
    rows = rows[context.get_world_rank() * share :][:share]
    clean = torch.from_numpy(images[rows]).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)) + context.get_world_rank())
    return clean, torch.from_numpy(labels[rows]), generator


def _train_loop(job: dict[str, Any]) -> None:
    config: PretrainConfig = job["config"]
    context = ray.train.get_context()
    is_rank_0 = context.get_world_rank() == 0
    images, labels = fashion.load_fashion_mnist("train", Path(config.data_folder))
    device = ray.train.torch.get_device()
    model = DiT(config.model)
    model.initialize(torch.Generator().manual_seed(config.seed))
    model.to(device)
    ema = Ema(model, config.ema_decay)
    optimizers = make_optimizers(model, config.learning_rate, config.weight_decay)
    step = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        ema.shadow = state["ema"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
    replica = ray.train.torch.prepare_model(model)
    forward = torch.compile(replica) if config.compile else replica
    metrics = job["mlflow"] if is_rank_0 else None
    last_checkpoint = last_log = time.monotonic()
    loss_sum, loss_count = 0.0, 0
    while step < config.steps:
        clean, label, generator = _batch(images, labels, config, step)
        loss = denoising_loss(
            forward,
            clean.to(device),
            label.to(device),
            generator,
            null_label=model.num_classes,
            label_dropout=config.label_dropout,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = learning_rate_factor(
            step, warmup=config.warmup_steps, total=config.steps, decay=config.decay_steps
        )
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(model, step)
        step += 1
        loss_sum, loss_count = loss_sum + loss.item(), loss_count + 1
        if metrics and step % 20 == 0:
            now = time.monotonic()
            metrics.log(
                {
                    "loss": loss_sum / loss_count,
                    "learning_rate_factor": factor,
                    "images_per_s": loss_count * config.batch_size / (now - last_log),
                },
                step=step,
            )
            logger.info(
                "step %d of %d, loss %.4f, %.0f images/s",
                step,
                config.steps,
                loss_sum / loss_count,
                loss_count * config.batch_size / (now - last_log),
            )
            loss_sum, loss_count, last_log = 0.0, 0, now
        is_due = time.monotonic() - last_checkpoint > config.checkpoint_interval_s
        due = torch.tensor([float(is_due)], device=device)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(due, src=0)  # reports are barriers: all ranks or none
        if due.item() or step == config.steps:
            last_checkpoint = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                if is_rank_0:
                    state = {
                        "model": model.state_dict(),
                        "ema": ema.shadow,
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                        "step": step,
                    }
                    torch.save(state, Path(folder) / "state.pt")
                ray.train.report(
                    {"step": step},
                    checkpoint=Checkpoint.from_directory(folder) if is_rank_0 else None,
                )


def pretrain(config: PretrainConfig) -> Checkpoint:
    """Train to `config.steps`, resuming what the run id already has; returns the last checkpoint."""
    storage = str(Path(config.storage_path).resolve())
    fashion.load_fashion_mnist("train", Path(config.data_folder))  # fails here, not on a worker
    connect()
    with stage_run("pretrain", config.run_id, storage, dataclasses.asdict(config)) as mlflow_run:
        trainer = TorchTrainer(
            _train_loop,
            train_loop_config={"config": config, "mlflow": mlflow_run},
            scaling_config=ScalingConfig(
                num_workers=config.num_workers,
                use_gpu=config.use_gpu,
            ),
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
    return result.checkpoint


def export(config: PretrainConfig) -> Path:
    """EMA weights of the last checkpoint in half precision, with the config beside them.

    Raises:
        ValueError: the run has no checkpoint yet.
    """
    run = Path(config.storage_path) / config.run_id
    checkpoints = sorted(run.glob("checkpoint_*/state.pt"))
    if not checkpoints:
        raise ValueError(f"run_id {config.run_id} has no checkpoint under {run.parent}: train it first")
    state = torch.load(checkpoints[-1], weights_only=True, map_location="cpu")
    target = Path(config.export)
    target.mkdir(parents=True, exist_ok=True)
    weights = {name: p.to(torch.float16).contiguous() for name, p in state["ema"].items()}
    save_file(weights, target / "model.safetensors")
    training = dataclasses.asdict(config)
    for name in ("model", "export", "data_folder", "storage_path"):
        training.pop(name)
    write_folder_config(
        target,
        config.model,
        fashion.CLASS_NAMES,
        data="Fashion-MNIST, 60,000 training images (Zalando Research, MIT licence)",
        command="python -m pipelines.pretrain",
        training={**training, "steps_done": state["step"]},
    )
    return target


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(PretrainConfig, description=__doc__)
    if config.export:
        logger.info("wrote %s", export(config))
    else:
        logger.info("last checkpoint: %s", pretrain(config))


if __name__ == "__main__":
    main()
