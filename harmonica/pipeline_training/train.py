"""`train_pipeline` trains a router for any diffusers pipeline, without Ray.

The training happens in the pipeline's own loop.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.router import Router
from harmonica.integrations.recorded.kinds import KINDS
from harmonica.integrations.recorded.pipelines import transformers_of
from harmonica.integrations.recorded.view import RecordedTransformer, fingerprint_of
from harmonica.pipeline_training.image_error import Errors, image_error
from harmonica.pipeline_training.pipeline_calls import PipelineCalls, Prompt
from harmonica.pipeline_training.policies import Generation, SdtPolicy
from harmonica.training.config import TrainingConfig
from harmonica.training.feasibility import check_training
from harmonica.training.plans.search import initial_router
from harmonica.training.sdt import SdtTrainer
from harmonica.training.target import TargetController
from harmonica.validation.finite import NotFinite, not_finite
from harmonica.validation.settings import SettingError

logger = logging.getLogger(__name__)

OnTrajectory = Callable[[int, dict[str, float]], object]
"""Called after each trajectory with its number and metrics."""
_SMALLEST = 1e-30


@dataclass(frozen=True)
class _Steps:
    """The sampler as the trainer sees it: its steps, and what branches cost."""

    num_steps: int
    model: RecordedTransformer


def train_pipeline(
    pipe: Any,
    prompts: Sequence[Prompt],
    config: TrainingConfig | None = None,
    *,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    cacheable: Sequence[str] = KINDS,
    on_trajectory: OnTrajectory | None = None,
) -> RouterArtifact:
    """Train a router for a diffusers pipeline by SDT with IEPO (arXiv 2410.01723).

    The pipeline samples as ever; its transformer runs the teacher and the student at every step, the router
    is updated, and the scheduler goes on from the student's output. Errors are those of the transformer's
    outputs, before guidance. The pipeline is left as it was.

    Args:
        pipe: a pipeline with a transformer, such as `FluxPipeline`; or with two that share trajectories.
        prompts: texts, or what `encode_prompt` gave for each, by the names of the pipeline's arguments.
        config: trajectories, batch size, objective and target; a target of speed is met by the plan.
        call: arguments of every call: `num_inference_steps`, guidance, height, width. The plan is for this
            number of steps.
        seed: of the noise and of random logits.
        cacheable: kinds of sub-modules that are branches: attn, cross, mlp, single.
        on_trajectory: called after each trajectory.

    Returns:
        The artifact that `harmonica.apply(pipe, artifact)` takes.

    Raises:
        SettingError: a setting that training in a pipeline has no counterpart of, or a target that is out
            of reach.
        ValueError: no prompts, a pipeline without a transformer, a class that is refused, or prompts that
            do not fit together.
        NotFinite: the router's updates are.
    """
    config = config or TrainingConfig()
    _check_settings(config)
    if not prompts:
        raise ValueError("prompts is empty: give one or more")
    calls = PipelineCalls(pipe, call or {}, seed=seed, cacheable=cacheable, reuse=config.sdt.reuse)
    with calls.opened(prompts[: config.batch_size]):
        run = _Training(calls, prompts, config)
        for trajectory in range(config.trajectories):
            metrics = run.train_one(trajectory)
            if on_trajectory is not None:
                on_trajectory(trajectory, metrics)
        return run.artifact()


def _check_settings(config: TrainingConfig) -> None:
    """Refuse settings that a pipeline's loop cannot serve.

    The loop gives no states from which sampling could go on in the middle.
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


class _Training:
    """A router's training from first to last trajectory."""

    def __init__(self, calls: PipelineCalls, prompts: Sequence[Prompt], config: TrainingConfig) -> None:
        self.calls, self.prompts, self.config = calls, prompts, config
        steps: Any = _Steps(calls.num_steps, calls.view)
        check_training(config, steps.model, calls.num_steps)
        router = initial_router(steps, config, calls.seed)
        device = next(calls.transformers[0].parameters()).device
        self.trainer = SdtTrainer(steps, router.to(device), config.sdt)
        self.target = TargetController(self.trainer, config)
        self.lambda_T = torch.ones(calls.num_steps - 1, device=device)
        self.trajectories = 0

    @property
    def router(self) -> Router:
        return self.trainer.router

    def _batch(self, trajectory: int) -> tuple[list[Prompt], list[int]]:
        rows = [trajectory * self.config.batch_size + place for place in range(self.config.batch_size)]
        return [self.prompts[row % len(self.prompts)] for row in rows], rows

    def train_one(self, trajectory: int) -> dict[str, float]:
        """Train one trajectory, and refresh lambda where it is due.

        Returns the metrics of the trajectory.

        Raises:
            NotFinite: a metric is not finite.
        """
        batch, config = self._batch(trajectory), self.config
        metrics: dict[str, float] = {}
        if config.iepo != "none" and trajectory % config.iepo_every == 0:
            metrics |= self._refresh(*batch)
        policy = SdtPolicy(self.trainer, self.lambda_T, self.target.beta, self.target.observe)
        self.calls.run(policy, *batch)
        records = policy.records
        if not records:
            raise ValueError("no step of the pipeline reuses anything of another: there is nothing to train")
        for name in ("loss", "mse", "l1"):
            values = [getattr(record, name) for record in records]
            metrics[name] = sum(values) / len(values)
        metrics["beta"] = self.target.beta
        self.target.update()
        self.trajectories += 1
        metrics["cur"] = self.target.plan_of(self.router.logits()).cur
        if found := not_finite(metrics):
            raise NotFinite(f"trajectory {trajectory}: {found}: give a smaller train.sdt.learning_rate")
        return metrics

    def _refresh(self, prompts: Sequence[Prompt], rows: Sequence[int]) -> dict[str, float]:
        """Measure lambda under the router as it stands; returns the metrics."""
        config = self.config
        assert config.iepo != "none"
        is_hard = config.sdt.student == "hard"

        def run(full: Collection[int], errors: Errors | None) -> Tensor:
            policy = Generation(self.router, config.sdt.threshold, is_hard, full, errors)
            return self.calls.run(policy, prompts, rows)

        lambda_T = image_error(run, self.calls.num_steps, config.iepo).to(self.lambda_T)
        measured = {f"lambda.step_{i:03d}": value for i, value in enumerate(lambda_T.tolist())}
        if config.has_target:
            lambda_T = lambda_T / lambda_T.mean().clamp_min(_SMALLEST)
        self.lambda_T = lambda_T
        return measured

    def artifact(self) -> RouterArtifact:
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
                "trajectories": self.trajectories,
                "initial": self.config.initial,
                "seed": calls.seed,
                "final_beta": self.target.beta,
                "prompts": len(self.prompts),
            },
        )
