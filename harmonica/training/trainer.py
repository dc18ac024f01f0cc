"""A router's training from first to last trajectory: what one worker holds, and what a checkpoint keeps.

Knows nothing of where rows come from or who the other workers are: `harmonica.cli.train` feeds it under
torchrun, `pipelines.training.stage` under Ray Train.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.plan import Plan
from harmonica.core.router import FIXED_LOGIT, Router
from harmonica.core.sampling import sample
from harmonica.samplers import Sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.config import TrainingConfig
from harmonica.training.loss_weights import StepWeights
from harmonica.training.phases import PHASES, PhaseName, phases_of
from harmonica.training.plans.builders import even_plan, logits_of, speedup_of
from harmonica.training.plans.forecast_fit import ForecastFit
from harmonica.training.plans.search import StepSearch, fastest_plan, initial_router
from harmonica.training.plans.selection import PlanSelector
from harmonica.training.sdt import SdtTrainer, micro_batches
from harmonica.training.target import TargetController
from harmonica.validation.finite import CURE, NotFinite, check_finite, not_finite


def average(tensor: Tensor) -> None:
    """Mean over all workers of the process group, in place; without one, nothing."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()


class RouterTrainer:
    """Trainer, lambda, beta, what comes before and after them, and position: all goes into a checkpoint.

    Four phases: a start is measured, the router is trained from it, its plan is held against those that need
    no training, the forecasts of the nearest one are fitted. A phase without trajectories is left out.
    """

    def __init__(
        self, sampler: Sampler, config: TrainingConfig, *, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.sampler, self.config, self.seed, self.device = sampler, config, seed, device
        router = initial_router(sampler, config, seed).to(device)
        self.trainer = SdtTrainer(sampler, router, config.sdt)
        with torch.no_grad():
            for i, row in enumerate(router.rows):
                if not self.trainer.trains(i):
                    row.fill_(FIXED_LOGIT)
        self.phases = phases_of(config, sampler.num_steps)
        self.weights = StepWeights(sampler.num_steps, config, device)
        self.target = TargetController(self.trainer, config)
        self.trajectory = 0
        self.search = StepSearch(sampler.num_steps) if config.start_trajectories else None
        self.starts: dict[str, Tensor] = {"start": router.logits()}
        """Logits (T, B) of the plans that need no training."""
        self.chosen = ""
        """Whose images were nearest to the full sampler's, a start's or those of what was trained."""
        self._choice: PlanSelector | None = None
        self._fit: ForecastFit | None = None

    @property
    def choice(self) -> PlanSelector | None:
        """Between the trained plan and the starts, while it is made."""
        if self._left_of("router") > 0 or self._left_of("choice") <= 0:
            return None
        if self._choice is None:
            plans = {name: self.target.plan_of(logits_TB) for name, logits_TB in self.starts.items()}
            if self.target.is_met_by(self.plan) or not plans:
                plans["trained"] = self.plan
            self._choice = PlanSelector(plans, self.config.sdt.reuse)
        return self._choice

    @property
    def fit(self) -> ForecastFit | None:
        """Of the forecasts, once the plan is final."""
        if self._fit is None and self.config.forecast.trajectories and self._left_of("choice") <= 0:
            self._fit = ForecastFit(self.plan, self.config.forecast)
        return self._fit

    def _left_of(self, name: PhaseName) -> int:
        """Trajectories until the phase ends."""
        until = PHASES[: PHASES.index(name) + 1]
        return sum(phase.trajectories for phase in self.phases if phase.name in until) - self.trajectory

    @property
    def router(self) -> Router:
        return self.trainer.router

    @property
    def plan(self) -> Plan:
        """Of the router as it stands, forecasts linear."""
        return self.target.plan_of(self.router.logits())

    def state(self) -> dict[str, Any]:
        return {
            "router": self.router.state_dict(),
            "optimizer": self.trainer.optimizer.state_dict(),
            "lambda": self.weights.lambda_T,
            "aim": self.target.state(),
            "trajectory": self.trajectory,
            "search": self.search.state() if self.search else None,
            "starts": self.starts,
            "chosen": self.chosen,
            "choice": self.choice.state() if self.choice else None,
            "forecast": self.fit.state() if self.fit else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.router.load_state_dict(state["router"])
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        self.weights.lambda_T = state["lambda"].to(self.device)
        self.trajectory, self.chosen = state["trajectory"], state["chosen"]
        self.starts = {name: logits_TB.to(self.device) for name, logits_TB in state["starts"].items()}
        if self.search:
            self.search.load_state(state["search"])
        self.target.load_state(state["aim"])
        if self.choice and state["choice"]:
            self.choice.load_state(state["choice"])
        if self.fit and state["forecast"]:
            self.fit.load_state(state["forecast"])

    def train_one(
        self,
        noise_NCHW: Tensor,
        condition_N: Any,
        keys: SampleKeys,
        average: Callable[[Tensor], None] = average,
    ) -> dict[str, float]:
        """One trajectory of whatever phase it is; the metrics to log.

        Raises:
            NotFinite: the same on all workers; the state before, as the last checkpoint has it, is good.
        """
        started, batch = time.monotonic(), (noise_NCHW, condition_N, keys)
        if self._left_of("start") > 0:
            metrics = self._measure_start(*batch, average)
        elif self._left_of("router") > 0:
            metrics = self._train_router(*batch, average)
        elif self.choice:
            metrics = self._compare(*batch, average)
        else:
            metrics = self._fit_forecasts(*batch, average)
        self._check(metrics, *batch)
        self.trajectory += 1
        metrics["cur"] = self.plan.cur
        metrics |= {f"seconds.{name}": took for name, took in self.trainer.stopwatch.take().items()}
        if "beta" in metrics:
            metrics["updates_per_s"] = (self.sampler.num_steps - 1) / (time.monotonic() - started)
        return metrics

    def _check(
        self, metrics: dict[str, float], noise_NCHW: Tensor, condition_N: Any, keys: SampleKeys
    ) -> None:
        """Stop where a number is not finite; metrics are averages over workers, so all of them do."""
        if not (found := not_finite(metrics)):
            return
        images_NCHW = sample(self.sampler, noise_NCHW, condition_N, keys=keys)
        check_finite(
            images_NCHW, f"trajectory {self.trajectory}: {found}, since the full sampler's images are"
        )
        raise NotFinite(
            f"trajectory {self.trajectory}: {found}, though the full sampler's images are finite: {CURE}; or "
            "give a smaller train.sdt.learning_rate"
        )

    def _measure_start(
        self, noise_NCHW: Tensor, condition_N: Any, keys: SampleKeys, average: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """One trajectory of the search; after the last one, the router starts from what it found."""
        assert self.search is not None
        parts = micro_batches(noise_NCHW, condition_N, keys, self.config.micro_batch_size)
        with self.trainer.stopwatch.measure("start"):
            metrics = self.search.observe(self.sampler, parts, self.config.sdt.reuse, average)
        self._check(metrics, noise_NCHW, condition_N, keys)
        if self._left_of("start") == 1:
            if self.config.target_psnr:
                reuse, psnr = self.config.sdt.reuse, self.config.target_psnr
                plan, found = fastest_plan(self.search, self.sampler, parts, psnr, reuse, average)
                self.target.set_speedup(plan.ideal_speedup(self.sampler.model.macs()))
                metrics |= {"target_speedup": self.target.speedup, "psnr": found}
            self._set_starts()
        return metrics

    def _set_starts(self) -> None:
        """The router begins with the best steps for its speed; where the start was measured, it is known."""
        assert self.search is not None
        num_steps, macs = self.sampler.num_steps, self.sampler.model.macs()
        speedup = self.target.speedup or speedup_of(self.config.target_cur, macs)
        plans = {
            "even": even_plan(num_steps, macs, speedup),
            "measured": self.search.plan(macs, speedup),
        }
        logit, like = self.config.initial_logit, self.weights.lambda_T
        self.starts = {name: logits_of(plan, logit).to(like) for name, plan in plans.items()}
        self._set_router(self.starts["measured"])

    def start_as(self, other: "RouterTrainer") -> None:
        """Where another run, for another speed, has measured the start, take it over."""
        self.trajectory = self.config.start_trajectories
        if self.search is not None and other.search is not None:
            self.search.load_state(other.search.state())
            self._set_starts()

    def _train_router(
        self, noise_NCHW: Tensor, condition_N: Any, keys: SampleKeys, average: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """A refresh of lambda where it is due, and an update of every row."""
        batch, since = (noise_NCHW, condition_N, keys), self.trajectory - self.config.start_trajectories
        metrics: dict[str, float] = {}
        if self.weights.is_due(since):
            with self.trainer.stopwatch.measure("lambda"):
                metrics = self.weights.refresh(self.sampler, self.router, *batch, average)
        records, _ = self.trainer.train_trajectory(
            noise_NCHW,
            condition_N,
            self.weights.lambda_T,
            keys=keys,
            beta=self.target.beta,
            micro_batch_size=self.config.micro_batch_size,
            average=average,
            on_gradient=self.target.observe,
        )
        means = torch.tensor([[r.loss, r.mse, r.l1] for r in records], device=self.device).mean(0)
        average(means)
        metrics |= dict(zip(("loss", "mse", "l1"), means.tolist(), strict=True)) | {"beta": self.target.beta}
        self.target.update()
        return metrics

    def _compare(
        self, noise_NCHW: Tensor, condition_N: Any, keys: SampleKeys, average: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """One trajectory of the choice; after the last one, the router is that of the nearer plan."""
        choice = self.choice
        assert choice is not None
        parts = micro_batches(noise_NCHW, condition_N, keys, self.config.micro_batch_size)
        with self.trainer.stopwatch.measure("choice"):
            metrics = choice.observe(self.sampler, parts, average)
        if choice.trajectories == self.config.choice_trajectories:
            self.chosen = choice.best
            if self.chosen in self.starts:
                self._set_router(self.starts[self.chosen])
        return metrics

    @torch.no_grad()
    def _set_router(self, logits_TB: Tensor) -> None:
        for row, logits_B in zip(self.router.rows, logits_TB, strict=True):
            row.copy_(logits_B)

    def _fit_forecasts(
        self, noise_NCHW: Tensor, condition_N: Any, keys: SampleKeys, average: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """One trajectory of the forecasts, its rows some at a time."""
        assert self.fit is not None, "there are forecast.trajectories left"
        size = self.config.micro_batch_size or self.config.forecast.rows_at_once
        with self.trainer.stopwatch.measure("forecast"):
            return self.fit.observe(self.sampler, micro_batches(noise_NCHW, condition_N, keys, size), average)

    def artifact(self, **provenance: Any) -> RouterArtifact:
        """The router as it stands, with what it was trained for."""
        settings = {"seed": self.seed, "final_beta": self.target.beta, **provenance}
        if self.chosen:
            settings["chosen"] = self.chosen
        return RouterArtifact.build(
            self.router.logits(),
            self.sampler,
            threshold=self.target.threshold_of(self.router.logits()),
            reuse=self.config.sdt.reuse,
            forecast_TBK=self.fit.weights_TBK if self.fit else None,
            training=settings | {"trajectories": self.trajectory},
        )
