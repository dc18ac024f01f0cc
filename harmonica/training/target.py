"""The target of a training: a speed or a share of reuse.

Beta and the threshold of plans follow from it.
"""

from collections.abc import Collection
from typing import Any

from torch import Tensor

from harmonica.core.plan import Plan
from harmonica.core.plan_builders import reusable_fraction, threshold_for
from harmonica.training.beta import BetaController
from harmonica.training.config import TrainingConfig
from harmonica.training.sdt import SdtTrainer

_MET = 0.02


class TargetController:
    """The target of one router.

    Its speed is configured, or found for a wanted quality by the start phase.
    """

    def __init__(self, trainer: SdtTrainer, config: TrainingConfig) -> None:
        self._trainer, self._config = trainer, config
        self.speedup = config.target_speedup
        """Full MACs over those of the plan; 0 for none."""
        self._controller = self._make_controller()

    def set_speedup(self, speedup: float) -> None:
        """Set the speed to reach, with a new controller of beta."""
        self.speedup = speedup
        self._controller = self._make_controller()

    def _make_controller(self) -> BetaController | None:
        """Return the controller of beta; None without a target.

        A speed is a share of MACs; it is counted in entries where the penalty is.
        """
        trainer, config = self._trainer, self._config
        num_steps = trainer.sampler.num_steps
        if self.speedup:
            fraction = reusable_fraction(num_steps, trainer.sampler.model.macs(), self.speedup)
        elif config.target_cur:
            fraction = config.target_cur * num_steps / (num_steps - 1)  # the target counts row T-1 too
        else:
            return None
        controller = BetaController(
            num_steps, trainer.costs_B, fraction=fraction, threshold=config.sdt.threshold
        )
        for i in range(num_steps - 1):
            if not trainer.trains(i):
                controller.spare(i)
        return controller

    @property
    def beta(self) -> float:
        """The configured beta, or the one that the target asks for at this point."""
        return self._controller.beta if self._controller else self._config.sdt.beta

    def observe(self, i: int, gradient_B: Tensor) -> None:
        """Take step i's gradient, before its update."""
        if self._controller:
            self._controller.observe(i, gradient_B, self._trainer.router.rows[i])

    def spare(self, steps: Collection[int]) -> None:
        """Keep steps from reuse that compute everything in any case."""
        if self._controller:
            for i in steps:
                self._controller.spare(i)

    def update(self) -> None:
        """Move beta on; called once a trajectory."""
        if self._controller:
            self._controller.update()

    def threshold_of(self, logits_TB: Tensor) -> float:
        """Return tau: the configured one, or the one at which the plan meets the speed."""
        if not self.speedup:
            return self._config.sdt.threshold
        return threshold_for(logits_TB.sigmoid(), self._trainer.sampler.model.macs(), self.speedup)

    def plan_of(self, logits_TB: Tensor) -> Plan:
        """Return the plan of these logits (T, B), with linear forecasts."""
        return Plan.from_scores(logits_TB.sigmoid(), self.threshold_of(logits_TB))

    def is_met_by(self, plan: Plan) -> bool:
        """Return whether the plan is within 2% of the speed or of the share of reuse.

        It is not where too many scores are equal to cut between.
        """
        if not self.speedup:
            wanted = self._config.target_cur
            return not wanted or abs(plan.cur - wanted) < _MET
        return abs(plan.ideal_speedup(self._trainer.sampler.model.macs()) / self.speedup - 1) < _MET

    def state(self) -> dict[str, Any]:
        """Return the speed and the controller's state for a checkpoint."""
        controller = self._controller.state_dict() if self._controller else None
        return {"speedup": self.speedup, "controller": controller}

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned."""
        if state["speedup"] != self.speedup:
            self.set_speedup(state["speedup"])
        if self._controller:
            self._controller.load_state_dict(state["controller"])
