"""Train a router on one worker, from first to last trajectory.

Checkpoints are part of it.

It knows nothing of where samples come from or who the other workers are. There is one for each target speed,
in a `harmonica.training.multi_target.MultiTargetTrainer`, which `harmonica.cli.train` feeds under torchrun
and `pipelines.training.stage` under Ray Train.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.plan import Plan
from harmonica.core.router import Router
from harmonica.samplers import Sampler
from harmonica.training.backend import TrajectoryBackend
from harmonica.training.budget import Numbers, numbers_of, with_numbers, with_used_numbers
from harmonica.training.config import TrainingConfig
from harmonica.training.context import TrainingContext
from harmonica.training.forecast_phase import ForecastPhase
from harmonica.training.phase import Phase
from harmonica.training.phases import PHASES
from harmonica.training.plans.forecast_fit import ForecastFit
from harmonica.training.sampler_backend import SamplerBackend
from harmonica.training.start_phase import StartPhase
from harmonica.validation.finite import CURE, NotFinite, check_finite, not_finite


def average(tensor: Tensor) -> None:
    """Average a tensor over all workers of the process group, in place.

    Without a process group, do nothing.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()


class RouterTrainer:
    """The training of one router.

    Its phases and their context are kept in checkpoints.
    """

    def __init__(
        self,
        sampler: Sampler,
        config: TrainingConfig,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        backend: TrajectoryBackend | None = None,
    ) -> None:
        """Begin a training.

        Args:
            backend: what runs the trajectories, where it is not the sampler itself.
        """
        self.sampler, self.config, self.seed, self.device = sampler, config, seed, device
        self.context = TrainingContext.create(backend or SamplerBackend(sampler), config, seed, device)
        num_steps = sampler.num_steps
        self.phases = [phase(self.context) for phase in PHASES if phase.costs(config, num_steps)]
        self.phase.begin()

    @property
    def phase(self) -> Phase:
        """Return the current phase; after all trajectories, the last one."""
        return next((phase for phase in self.phases if not phase.is_done), self.phases[-1])

    @property
    def trajectory(self) -> int:
        """Number of trajectories done, of all phases."""
        return sum(phase.done for phase in self.phases)

    @property
    def router(self) -> Router:
        """Return the router that is trained."""
        return self.context.router

    @property
    def plan(self) -> Plan:
        """Return the router's present plan, with linear forecasts."""
        return self.context.plan

    @property
    def numbers(self) -> Numbers:
        """Return the numbers of trajectories of the phases, as the settings give them."""
        return numbers_of(self.config)

    def set_numbers(self, numbers: Numbers) -> None:
        """Take other numbers of trajectories for the phases that have not begun."""
        kept = {phase.name for phase in self.phases if phase.done}
        wanted = {name: count for name, count in numbers.items() if name not in kept}
        self.config = self.context.config = with_numbers(self.config, wanted)
        for phase in self.phases:
            if phase.name not in kept:
                phase.count(self.config)
        if self.phase.name not in kept:
            self.phase.begin()  # again, with its own number

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: tensors and plain values."""
        phases = {phase.state_key: phase.state() for phase in self.phases}
        return self.context.state() | phases | {"trajectory": self.trajectory}

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned."""
        self.context.load_state(state)  # first, since phases are made of it
        left = state["trajectory"]
        for phase in self.phases:
            phase.done = min(left, phase.trajectories)
            left -= phase.done
        if not self.phase.is_done:
            self.phase.begin()
        for phase in self.phases:
            if state.get(phase.state_key) is not None:
                phase.load_state(state[phase.state_key])

    def start_as(self, other: "RouterTrainer") -> None:
        """Take over the start that another trainer has measured, for another speed."""
        ours, theirs = self.phases[0], other.phases[0]
        if isinstance(ours, StartPhase) and isinstance(theirs, StartPhase):
            ours.skip(theirs)
            self.phase.begin()

    def train_one(self, batch: Any, average: Callable[[Tensor], None] = average) -> dict[str, float]:
        """Do one trajectory of the current phase and return the metrics to log.

        Raises:
            NotFinite: a metric is infinite or NaN, on all workers alike; the last checkpoint is still good.
        """
        phase = self.phase
        assert not phase.is_done, "all trajectories are done"
        metrics = phase.step(batch, average)
        self._check(metrics, batch)
        if phase.done + 1 == phase.trajectories:
            metrics |= phase.finish(batch, average)
            self._check(metrics, batch)
        phase.done += 1
        if self.phase is not phase:
            self.phase.begin()
        metrics["cur"] = self.plan.cur
        metrics |= {f"seconds.{name}": took for name, took in self.context.sdt.stopwatch.take().items()}
        return metrics

    def _check(self, metrics: dict[str, float], batch: Any) -> None:
        """Raise where a metric is not finite.

        Metrics are averages over workers, so all workers raise together.
        """
        if not (found := not_finite(metrics)):
            return
        check_finite(
            self.context.backend.images(batch),
            f"trajectory {self.trajectory}: {found}, since the full sampler's images are",
        )
        raise NotFinite(
            f"trajectory {self.trajectory}: {found}, though the full sampler's images are finite: {CURE}; or "
            "give a smaller train.sdt.learning_rate"
        )

    def artifact(self, **provenance: Any) -> RouterArtifact:
        """Return the present router, with the settings that it was trained for."""
        logits_TB = self.router.logits()
        return RouterArtifact.build(
            logits_TB,
            self.sampler,
            threshold=self.context.target.threshold_of(logits_TB),
            reuse=self.config.sdt.reuse,
            forecast_TBK=self.forecast_TBK,
            correction_TJ=self.correction_TJ,
            segments=self._fit.plan.segments if self._fit else None,
            training=self.provenance(**provenance),
        )

    @property
    def forecast_TBK(self) -> Tensor | None:
        """Return the fitted forecast weights; None where forecasts are linear."""
        return self._fit.weights.forecast_of(self._fit.plan) if self._fit else None

    @property
    def correction_TJ(self) -> Tensor | None:
        """Return the fitted weights of the output's correction; None where there is none."""
        fit = self._fit
        return fit.weights.correction_TJ if fit and fit.weights.correction_TJ.numel() else None

    @property
    def _fit(self) -> ForecastFit | None:
        last = self.phases[-1]
        return last.fit if isinstance(last, ForecastPhase) else None

    def provenance(self, **more: Any) -> dict[str, Any]:
        """Return what an artifact says of its training, as JSON values."""
        context = self.context
        settings = {"seed": self.seed, "final_beta": context.target.beta, **more}
        if context.chosen:
            settings["chosen"] = context.chosen
        if self.config.speed == "measured":
            settings["macs_speedup"] = self.config.target_speedup
        if context.found:
            settings["found"] = dict(context.found)
        if self.config.budget:  # what was set is not what was done
            settings = with_used_numbers(settings, self.numbers)
        return settings | {"trajectories": self.trajectory}
