"""Train routers in a pipeline on one worker, with checkpoints.

As in `harmonica.training.trainer`, it is not told who the other workers are: each draws its own rows of the
batch with its own copy of the pipeline, and what the router learns from is averaged over all.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.plan import Plan
from harmonica.core.router import Router
from harmonica.data.samples import Shard
from harmonica.integrations.recorded.kinds import BLOCKS
from harmonica.pipeline_training.artifacts import artifact_of
from harmonica.pipeline_training.backend import PipelineBackend, PipelineBatch
from harmonica.pipeline_training.pipeline_calls import PipelineCalls
from harmonica.pipeline_training.sampling import Prompt, check_prompts, check_seed
from harmonica.samplers.noise import SampleKeys
from harmonica.training.config import TrainingConfig
from harmonica.training.multi_target import MultiTargetTrainer, target_name
from harmonica.training.progress import Progress
from harmonica.training.trainer import RouterTrainer, average
from harmonica.validation.settings import SettingError

logger = logging.getLogger(__name__)


class PipelineTrainer:
    """Trains routers in a diffusers pipeline: one, or one for each of several speeds.

    It is used in a `with` statement. Inside, the pipeline's transformers are recorded and their forwards
    replaced; afterwards the pipeline is as it was.
    """

    run: MultiTargetTrainer
    """The training itself, once the pipeline is recorded."""

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[Prompt],
        config: TrainingConfig,
        *,
        call: Mapping[str, Any] | None = None,
        seed: int = 0,
        cacheable: Sequence[str] = (BLOCKS,),
        shard: Shard | None = None,
    ) -> None:
        """Check the settings; nothing is computed before the `with` statement.

        Args:
            pipe: a pipeline with a transformer, or with two that share trajectories.
            prompts: of all workers, each a text or what `encode_prompt` gave; rows take them in turn.
            call: arguments of every call of the pipeline.
            seed: of the noise and of random logits.
            cacheable: `("blocks",)`, or kinds of sub-modules that are branches.
            shard: this worker's rows of each batch; by default all.

        Raises:
            SettingError: a setting that training in a pipeline has no counterpart of, or too large a seed.
            ValueError: no prompts, or a pipeline without a transformer.
        """
        check_settings(config)
        check_prompts(prompts)
        check_seed(seed)
        self.prompts, self.config, self.seed = prompts, config, seed
        self.shard = shard or Shard(config.batch_size)
        self.calls = PipelineCalls(pipe, call or {}, seed=seed, cacheable=cacheable, reuse=config.sdt.reuse)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Record the pipeline's first step.

        Raises:
            SettingError: a target that is out of reach.
            ValueError: the pipeline refuses the call, or its transformer has no plan.
        """
        with ExitStack() as stack:
            stack.enter_context(self.calls.opened(self._batch(0).prompts))
            self._begin()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _begin(self) -> None:
        self.backend = backend = PipelineBackend(self.calls)
        # A recorded transformer has branches and costs as a model of a branch file does.
        sampler: Any = backend.sampler
        self.run = MultiTargetTrainer(
            sampler, self.config, seed=self.seed, device=backend.device, backend=backend
        )

    @property
    def sampler(self) -> Any:
        """Return an object with `num_steps`, and a `model` with `branches` and `macs()`."""
        return self.run.sampler

    @property
    def device(self) -> torch.device | str:
        return self.run.device

    @property
    def router(self) -> Router:
        return self.run.router

    @property
    def plan(self) -> Plan:
        """Return the router's present plan, with linear forecasts."""
        return self.run.plan

    @property
    def trajectory(self) -> int:
        """Number of trajectories done, of all phases and all speeds."""
        return self.run.trajectory

    @property
    def next_trajectories(self) -> range:
        """Trajectories that are still to be done, of all phases and speeds."""
        return range(self.trajectory, self.run.all_trajectories)

    @property
    def all_trajectories(self) -> int:
        """Return the number of trajectories of all phases and all speeds."""
        return self.run.all_trajectories

    @property
    def progress(self) -> Progress:
        """Return the phases of all speeds and what their trajectories cost."""
        return self.run.progress

    @property
    def announcement(self) -> str:
        """Return what was measured and decided of it, in a line; "" if nothing was."""
        return self.run.announcement

    def prepare(self) -> None:
        """Measure what `train.speed` and `train.budget` need, unless it is measured.

        Raises:
            SettingError: the speed or the budget is out of reach; on all workers alike.
        """
        self.run.prepare(self._batch(0))

    def _batch(self, trajectory: int) -> PipelineBatch:
        """Return this worker's rows of a trajectory."""
        rows = self.shard.indices(np.arange(self.shard.size), trajectory).tolist()
        prompts = [self.prompts[row % len(self.prompts)] for row in rows]
        return PipelineBatch(prompts, SampleKeys.of(self.seed, rows))

    def train_one(self, average: Callable[[Tensor], None] = average) -> dict[str, float]:
        """Do the next trajectory and return the metrics to log.

        Args:
            average: averages a tensor over all workers in place; by default over the process group.

        Raises:
            NotFinite: a metric is infinite or NaN, on all workers alike.
        """
        return self.run.train_one(self._batch(self.run.current.trajectory), average)

    def state(self) -> dict[str, Any]:
        """Return a checkpoint's tensors and plain values, the same on every worker."""
        return self.run.state() | {
            "fixed_steps": sorted(self.backend.fixed_steps),
            "calls": self.calls.num_calls,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.backend.fixed_steps = frozenset(state["fixed_steps"])  # first, since phases begin with it
        self.calls.num_calls = state.get("calls", 0)  # checkpoints from before have none
        # Checkpoints from before there were several speeds hold the state of one training itself.
        self.run.load_state(state if "members" in state else {"members": [state]})

    def artifact(self, **provenance: Any) -> RouterArtifact:
        """Return the present router of the main target, with its settings."""
        return self._artifact(self.run.trainers[0], provenance)

    def extra_artifacts(self, **provenance: Any) -> dict[str, RouterArtifact]:
        """Return the routers of the extra speeds, by the name of the speed, as in "1.5x"."""
        return {
            target_name(target): self._artifact(one, provenance | {"target_speedup": target})
            for target, one in self.run.extra_trainers.items()
        }

    def _artifact(self, run: RouterTrainer, provenance: Mapping[str, Any]) -> RouterArtifact:
        logits_TB = run.router.logits().cpu()
        target, macs = run.context.target, self.calls.view.macs()
        plan = target.plan_of(logits_TB)
        if run.config.has_target and not target.is_met_by(plan):
            cause = (
                "one branch is reused in whole steps" if plan.num_branches == 1 else "give more trajectories"
            )
            logger.warning(
                "the router's plan is %.2fx and reuses %.0f%%, which is not what it was trained for: %s; "
                "steps at which a second transformer or a smaller batch begins are always computed",
                *(plan.ideal_speedup(macs), 100 * plan.cur, cause),
            )
        settings: dict[str, Any] = {"initial": self.config.initial, "prompts": len(self.prompts)}
        return artifact_of(
            self.calls,
            self.prompts,
            plan,
            logits_TB,
            threshold=target.threshold_of(logits_TB),
            reuse=self.config.sdt.reuse,
            learned=(run.forecast_TBK, run.correction_TJ),
            training=run.provenance(**settings | dict(provenance)),
        )


def check_settings(config: TrainingConfig) -> None:
    """Refuse settings that need states from which a pipeline could go on.

    Raises:
        SettingError: names the setting, its value and what to give instead.
    """
    one_by_one = {
        "train.shard_model": (config.shard_model, config.shard_model, False),
        "train.sdt.objective": (config.sdt.objective, config.sdt.objective == "pairwise", "stepwise"),
        "train.sdt.activation_checkpointing": (True, config.sdt.activation_checkpointing, False),
    }
    for name, (value, is_refused, cure) in one_by_one.items():
        if is_refused:
            raise SettingError(f"{name} is {value}, which training in a pipeline does not do: give {cure}")
