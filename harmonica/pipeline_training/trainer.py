"""The training of a router in a pipeline on one worker, from first to last trajectory, with its checkpoints.

It knows nothing of who the other workers are, as `harmonica.training.trainer`: each draws its own rows of
the batch with its own copy of the pipeline, and what the router learns from is averaged over all.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.plan import Plan
from harmonica.core.router import Router
from harmonica.data.samples import Shard
from harmonica.integrations.recorded.kinds import KINDS
from harmonica.integrations.recorded.pipelines import transformers_of
from harmonica.integrations.recorded.view import RecordedTransformer, fingerprint_of
from harmonica.pipeline_training.image_error import Errors, image_changes
from harmonica.pipeline_training.pipeline_calls import PipelineCalls, Prompt
from harmonica.pipeline_training.policies import Generation, SdtPolicy
from harmonica.training.config import TrainingConfig
from harmonica.training.feasibility import check_training
from harmonica.training.iepo import lambda_of
from harmonica.training.plans.search import initial_router
from harmonica.training.sdt import SdtTrainer
from harmonica.training.target import TargetController
from harmonica.training.trainer import average
from harmonica.validation.finite import NotFinite, not_finite
from harmonica.validation.settings import SettingError

logger = logging.getLogger(__name__)

_SMALLEST = 1e-30


@dataclass(frozen=True)
class _Steps:
    """What the trainer of a router asks of a sampler: how many steps, and what branches cost."""

    num_steps: int
    model: RecordedTransformer


class PipelineTrainer:
    """The training of one router in a diffusers pipeline; to be used in a `with` statement.

    Inside, the pipeline's transformers are recorded and their forwards replaced; afterwards the pipeline is
    as it was.
    """

    trainer: SdtTrainer
    """The router and its optimiser, once the pipeline is recorded."""
    target: TargetController
    """The controller of the target; it sets beta and the threshold of plans."""

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[Prompt],
        config: TrainingConfig,
        *,
        call: Mapping[str, Any] | None = None,
        seed: int = 0,
        cacheable: Sequence[str] = KINDS,
        shard: Shard | None = None,
    ) -> None:
        """Check the settings; nothing is computed before the `with` statement.

        Args:
            pipe: a pipeline with a transformer, or with two that share trajectories.
            prompts: of all workers, each a text or what `encode_prompt` gave; rows take them in turn.
            call: arguments of every call of the pipeline.
            seed: of the noise and of random logits.
            cacheable: kinds of sub-modules that are branches.
            shard: this worker's rows of each batch; by default all.

        Raises:
            SettingError: a setting that training in a pipeline has no counterpart of.
            ValueError: no prompts, or a pipeline without a transformer.
        """
        check_settings(config)
        if not prompts:
            raise ValueError("prompts is empty: give one or more")
        self.prompts, self.config, self.seed = prompts, config, seed
        self.shard = shard or Shard(config.batch_size)
        self.calls = PipelineCalls(pipe, call or {}, seed=seed, cacheable=cacheable, reuse=config.sdt.reuse)
        self.trajectory = 0
        """Number of trajectories done."""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Record the pipeline's first step.

        Raises:
            SettingError: a target that is out of reach.
            ValueError: the pipeline refuses the call, or its transformer has no plan.
        """
        with ExitStack() as stack:
            stack.enter_context(self.calls.opened(self._batch(0)[0]))
            self._begin()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _begin(self) -> None:
        calls, config = self.calls, self.config
        # A recorded transformer has branches and costs as a model of a branch file does.
        steps: Any = _Steps(calls.num_steps, calls.view)
        self.sampler = steps
        check_training(config, self.sampler.model, calls.num_steps)
        router = initial_router(self.sampler, config, self.seed)
        self.device = next(calls.transformers[0].parameters()).device
        self.trainer = SdtTrainer(self.sampler, router.to(self.device), config.sdt)
        self.target = TargetController(self.trainer, config)
        self.lambda_T = torch.ones(calls.num_steps - 1, device=self.device)

    @property
    def router(self) -> Router:
        return self.trainer.router

    @property
    def plan(self) -> Plan:
        """Return the router's present plan, with linear forecasts."""
        return self.target.plan_of(self.router.logits())

    @property
    def next_trajectories(self) -> range:
        """Trajectories that are still to be trained; empty when all are done."""
        return range(self.trajectory, self.config.all_trajectories)

    def _batch(self, trajectory: int) -> tuple[list[Prompt], list[int]]:
        """Return this worker's prompts and rows of a trajectory."""
        rows = self.shard.indices(np.arange(self.shard.size), trajectory).tolist()
        return [self.prompts[row % len(self.prompts)] for row in rows], rows

    def train_one(self, average: Callable[[Tensor], None] = average) -> dict[str, float]:
        """Train the next trajectory, with a refresh of lambda where it is due; returns its metrics.

        Args:
            average: averages a tensor over all workers in place; by default over the process group.

        Raises:
            NotFinite: a metric is infinite or NaN, on all workers alike.
        """
        assert self.next_trajectories, "all trajectories are done"
        batch, config = self._batch(self.trajectory), self.config
        metrics: dict[str, float] = {}
        if config.iepo != "none" and self.trajectory % config.iepo_every == 0:
            metrics |= self._refresh(*batch, average)
        policy = SdtPolicy(self.trainer, self.lambda_T, self.target.beta, average, self.target.observe)
        self.calls.run(policy, *batch)
        if not (records := policy.records):
            raise ValueError("no step of the pipeline reuses anything of another: there is nothing to train")
        means = torch.tensor([[r.loss, r.mse, r.l1] for r in records], device=self.device).mean(0)
        average(means)
        metrics |= dict(zip(("loss", "mse", "l1"), means.tolist(), strict=True)) | {"beta": self.target.beta}
        self.target.update()
        metrics["cur"] = self.plan.cur
        if found := not_finite(metrics):
            raise NotFinite(f"trajectory {self.trajectory}: {found}: give a smaller train.sdt.learning_rate")
        self.trajectory += 1
        metrics |= {f"seconds.{name}": took for name, took in self.trainer.stopwatch.take().items()}
        return metrics

    def _refresh(
        self, prompts: Sequence[Prompt], rows: Sequence[int], average: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """Measure lambda under the router as it stands; returns the metrics."""
        config = self.config
        assert config.iepo != "none"
        is_hard = config.sdt.student == "hard"

        def run(full: Collection[int], errors: Errors | None) -> Tensor:
            policy = Generation(self.router, config.sdt.threshold, is_hard, full, errors)
            return self.calls.run(policy, prompts, rows)

        changes_2T = image_changes(run, self.calls.num_steps, config.iepo)
        lambda_T = lambda_of(changes_2T.to(self.lambda_T), config.iepo, average)
        measured = {f"lambda.step_{i:03d}": value for i, value in enumerate(lambda_T.tolist())}
        if config.has_target:
            lambda_T = lambda_T / lambda_T.mean().clamp_min(_SMALLEST)
        self.lambda_T = lambda_T
        return measured

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: tensors and plain values, the same on every worker."""
        return {
            "router": self.router.state_dict(),
            "optimizer": self.trainer.optimizer.state_dict(),
            "aim": self.target.state(),
            "lambda": self.lambda_T,
            "trajectory": self.trajectory,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.router.load_state_dict(state["router"])
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        self.target.load_state(state["aim"])
        self.lambda_T = state["lambda"].to(self.device)
        self.trajectory = state["trajectory"]

    def artifact(self, **provenance: Any) -> RouterArtifact:
        """Return the router as it stands, with what it was trained for."""
        calls, view, logits_TB = self.calls, self.calls.view, self.router.logits().cpu()
        plan, macs = self.target.plan_of(logits_TB), view.macs()
        if self.config.has_target and not self.target.is_met_by(plan):
            logger.warning(
                "the router's plan is %.2fx and reuses %.0f%%, which is not what it was trained for: give "
                "more trajectories; steps at which a second transformer or a smaller batch begins are "
                "always computed",
                *(plan.ideal_speedup(macs), 100 * plan.cur),
            )
        weights = fingerprint_of(transformers_of(calls.pipe))
        shared = {"transformers": len(calls.transformers)}
        return RouterArtifact(
            logits_TB=logits_TB.float(),
            threshold=self.target.threshold_of(logits_TB),
            sampler=calls.sampler_config(),
            reuse=self.config.sdt.reuse,
            model={**view.shape(), **shared, "weights": weights.exact},
            rounded_weights=weights.rounded,
            ideal_speedup=plan.ideal_speedup(macs),
            macs_full=macs.full * plan.num_steps,
            training={
                "pipeline": type(calls.pipe).__name__,
                "initial": self.config.initial,
                "seed": self.seed,
                "final_beta": self.target.beta,
                "prompts": len(self.prompts),
                "call": calls.described_call(self.prompts[:1]),
                **provenance,
                "trajectories": self.trajectory,
            },
        )


def check_settings(config: TrainingConfig) -> None:
    """Refuse settings that need what a pipeline's loop does not give: states to go on from in the middle.

    Raises:
        SettingError: names the setting, its value and what to give instead.
    """
    one_by_one = {
        "train.initial": (config.initial, config.initial == "measured", "even"),
        "train.choice_trajectories": (config.choice_trajectories, config.choice_trajectories > 0, 0),
        "train.forecast.trajectories": (config.forecast.trajectories, config.forecast.trajectories > 0, 0),
        "train.targets": (config.targets, bool(config.targets), "none, and train each"),
        "train.target_psnr": (config.target_psnr, config.target_psnr > 0, "train.target_speedup"),
        "train.micro_batch_size": (config.micro_batch_size, config.micro_batch_size > 0, 0),
        "train.shard_model": (config.shard_model, config.shard_model, False),
        "train.sdt.objective": (config.sdt.objective, config.sdt.objective == "pairwise", "stepwise"),
        "train.sdt.activation_checkpointing": (True, config.sdt.activation_checkpointing, False),
    }
    for name, (value, is_refused, cure) in one_by_one.items():
        if is_refused:
            raise SettingError(f"{name} is {value}, which training in a pipeline does not do: give {cure}")
