"""A router's training from first to last trajectory: what one worker holds, and what a checkpoint keeps.

Knows nothing of where rows come from or who the other workers are: `harmonica.train` feeds it under
torchrun, `pipelines.train` under Ray Train.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from harmonica.artifact import RouterArtifact
from harmonica.beta import BetaController
from harmonica.forecast import ForecastConfig, ForecastFit
from harmonica.iepo import KINDS, IepoKind, image_error_proxy
from harmonica.noise import RowKeys
from harmonica.router import Router
from harmonica.samplers import Sampler
from harmonica.sdt import SdtConfig, SdtTrainer, micro_batches


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Router training, wherever it runs."""

    trajectories: int = 60
    """Trajectories in all; each updates every row of the router once."""
    batch_size: int = 8
    """(label, noise) rows of one trajectory, over all workers."""
    micro_batch_size: int = 0
    """Rows that a worker computes at a time, where its share does not fit in memory; 0 is all of it. An
    update is that of the whole batch all the same."""
    shard_model: bool = False
    """Every worker holds its share of the frozen weights (FSDP2), where one GPU cannot hold them all."""
    sdt: SdtConfig = field(default_factory=SdtConfig)
    """Objective and optimiser."""
    target_cur: float = 0.0
    """When above 0, beta follows from this share of reused entries; else beta stays as set."""
    initial: Literal["constant", "alternate", "normal"] = "constant"
    """Logits to start from: all `initial_logit`, that with its sign changing from step to step, or
    standard normal (the released code)."""
    initial_logit: float = 5.0
    """Where constant and alternate logits start; 5 computes everything."""
    iepo: IepoKind | Literal["none"] = "leave_one_out"
    """How lambda is measured: the paper's way, the released code's (cumulative), per unit of step error
    (sensitivity), or not at all (all ones)."""
    iepo_every: int = 20
    """Trajectories between refreshes of lambda (the paper's C)."""
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    """Weights of forecasts, fitted once the router is trained."""
    checkpoint_interval_s: float = 20.0
    """Seconds between checkpoints: the work an interruption can cost."""

    def __post_init__(self) -> None:
        for name in ("trajectories", "batch_size", "iepo_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}: give 1 or more")
        if self.micro_batch_size < 0:
            raise ValueError(
                f"train.micro_batch_size is {self.micro_batch_size}: give 1 or more, or 0 for all at once"
            )
        if not 0 <= self.target_cur < 1:
            raise ValueError(f"train.target_cur is {self.target_cur}: give 0 to below 1")
        if self.iepo not in (*KINDS, "none"):
            raise ValueError(f"train.iepo is {self.iepo!r}: give one of {', '.join(KINDS)}, none")
        if self.initial not in ("constant", "alternate", "normal"):
            raise ValueError(f"train.initial is {self.initial!r}: give constant, alternate or normal")
        if self.forecast.trajectories and self.sdt.reuse != "forecast":
            raise ValueError(
                f"train.forecast.trajectories is {self.forecast.trajectories} and train.sdt.reuse is "
                f"{self.sdt.reuse}: give reuse forecast, or 0 trajectories"
            )

    @property
    def all_trajectories(self) -> int:
        """The router's, and then the forecast's."""
        return self.trajectories + self.forecast.trajectories


def average(tensor: Tensor) -> None:
    """Mean over all workers of the process group, in place; without one, nothing."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()


def _initial_router(shape: tuple[int, int], config: TrainingConfig, seed: int) -> Router:
    if config.initial == "normal":
        return Router.normal(*shape, seed)
    if config.initial == "alternate":
        return Router.alternating(*shape, config.initial_logit)
    return Router(*shape, config.initial_logit)


class RouterRun:
    """Trainer, lambda, beta and position; all of it goes into a checkpoint."""

    def __init__(
        self, sampler: Sampler, config: TrainingConfig, *, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.sampler, self.config, self.seed, self.device = sampler, config, seed, device
        shape = (sampler.num_steps, len(sampler.model.branches))
        router = _initial_router(shape, config, seed).to(device)
        self.trainer = SdtTrainer(sampler, router, config.sdt)
        self.lambda_T = torch.ones(sampler.num_steps - 1, device=device)
        self.beta: BetaController | None = None
        if config.target_cur:
            self.beta = BetaController(*shape, target_cur=config.target_cur, threshold=config.sdt.threshold)
        self.trajectory = 0
        self._fit: ForecastFit | None = None

    @property
    def fit(self) -> ForecastFit | None:
        """Of the forecasts, once the router is trained and has its plan."""
        if self._fit is None and self.config.forecast.trajectories and self._is_router_trained:
            self._fit = ForecastFit(self.router.plan(self.config.sdt.threshold), self.config.forecast)
        return self._fit

    @property
    def _is_router_trained(self) -> bool:
        return self.trajectory >= self.config.trajectories

    @property
    def router(self) -> Router:
        return self.trainer.router

    @property
    def cur(self) -> float:
        """Of the router as it stands."""
        return self.router.plan(self.config.sdt.threshold).cur

    @property
    def beta_now(self) -> float:
        """As configured, or what the target asks for at this point."""
        return self.beta.beta if self.beta else self.config.sdt.beta

    def state(self) -> dict[str, Any]:
        return {
            "router": self.router.state_dict(),
            "optimizer": self.trainer.optimizer.state_dict(),
            "lambda": self.lambda_T,
            "beta": self.beta.state_dict() if self.beta else None,
            "trajectory": self.trajectory,
            "forecast": self.fit.state() if self.fit else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.router.load_state_dict(state["router"])
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        self.lambda_T = state["lambda"].to(self.device)
        self.trajectory = state["trajectory"]
        if self.beta:
            self.beta.load_state_dict(state["beta"])
        if self.fit and state["forecast"]:
            self.fit.load_state(state["forecast"])

    def train_one(
        self,
        noise_NCHW: Tensor,
        condition_N: Any,
        rows: RowKeys,
        average: Callable[[Tensor], None] = average,
    ) -> dict[str, float]:
        """One trajectory of the router, after a refresh of lambda where it is due, or of the forecasts; the
        metrics to log."""
        config, started = self.config, time.monotonic()
        if self._is_router_trained:
            return self._fit_one(noise_NCHW, condition_N, rows, average)
        metrics = {}
        if config.iepo != "none" and self.trajectory % config.iepo_every == 0:
            with self.trainer.stopwatch.measure("lambda"):
                self.lambda_T = image_error_proxy(
                    self.sampler,
                    self.router,
                    noise_NCHW,
                    condition_N,
                    kind=config.iepo,
                    threshold=config.sdt.threshold,
                    reuse=config.sdt.reuse,
                    rows=rows,
                    micro_batch_size=config.micro_batch_size,
                    average=average,
                )
            metrics = {f"lambda.step_{i:03d}": value for i, value in enumerate(self.lambda_T.tolist())}
        records, _ = self.trainer.train_trajectory(
            noise_NCHW,
            condition_N,
            self.lambda_T,
            rows=rows,
            beta=self.beta_now,
            micro_batch_size=config.micro_batch_size,
            average=average,
            on_gradient=self._observe,
        )
        self.trajectory += 1
        means = torch.tensor([[r.loss, r.mse, r.l1] for r in records], device=self.device).mean(0)
        average(means)
        metrics |= dict(zip(("loss", "mse", "l1"), means.tolist(), strict=True))
        metrics |= {"cur": self.cur, "beta": self.beta_now}
        metrics |= {f"seconds.{n}": took for n, took in self.trainer.stopwatch.take().items()}
        metrics["updates_per_s"] = len(records) / (time.monotonic() - started)
        if self.beta:
            self.beta.update()
        return metrics

    def _fit_one(
        self, noise_NCHW: Tensor, condition_N: Any, rows: RowKeys, average: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """One trajectory of the forecasts, its rows some at a time."""
        assert self.fit is not None, "there are forecast.trajectories left"
        started, size = time.monotonic(), self.config.micro_batch_size or self.config.forecast.rows_at_once
        parts = micro_batches(noise_NCHW, condition_N, rows, size)
        metrics = self.fit.train_one(self.sampler, parts, average)
        self.trajectory += 1
        return metrics | {"cur": self.cur, "seconds.forecast": time.monotonic() - started}

    def _observe(self, i: int, gradient_B: Tensor) -> None:
        if self.beta:
            self.beta.observe(i, gradient_B, self.router.rows[i])

    def artifact(self, **provenance: Any) -> RouterArtifact:
        """The router as it stands, with what it was trained for."""
        settings = {"seed": self.seed, "final_beta": self.beta_now, **provenance}
        return RouterArtifact.build(
            self.router.logits(),
            self.sampler,
            threshold=self.config.sdt.threshold,
            reuse=self.config.sdt.reuse,
            forecast_TBK=self.fit.weights_TBK if self.fit else None,
            training=settings | {"trajectories": self.trajectory},
        )
