"""One training, several speeds: a router for each, all from the same measured start.

The members train after one another, each on the rows that it would see alone, so that each is bit for bit the
router that a training of its own would have made; what they share is the start, measured once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.plan import Plan
from harmonica.core.router import Router
from harmonica.samplers import Sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.config import TrainingConfig
from harmonica.training.feasibility import check_training
from harmonica.training.phases import Phase, phases_of
from harmonica.training.trainer import RouterTrainer, average


class MultiTargetTrainer:
    """A `RouterTrainer` for the main target, and then one for each of `train.targets`.

    The main target is `train.target_speedup` or what else is asked; with no targets it is a family of one.

    Raises:
        SettingError: the model cannot be trained for one of them.
    """

    def __init__(
        self, sampler: Sampler, config: TrainingConfig, *, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.sampler, self.config, self.device = sampler, config, device
        check_training(config, sampler.model, sampler.num_steps)
        self.members = [
            RouterTrainer(sampler, one, seed=seed, device=device) for one in target_configs(config)
        ]
        self._place = 0

    @property
    def current(self) -> RouterTrainer:
        """The member that trains now; in the end the last one."""
        return self.members[self._place]

    @property
    def trajectory(self) -> int:
        """Trajectories trained so far, of all members; the start's count once."""
        done = sum(member.trajectory for member in self.members[: self._place + 1])
        return done - self._place * self.config.start_trajectories

    @property
    def next_rows(self) -> range:
        """Trajectories whose rows the current member takes from here on; empty when all are trained."""
        return range(self.current.trajectory, self.current.config.all_trajectories)

    @property
    def router(self) -> Router:
        return self.current.router

    @property
    def plan(self) -> Plan:
        return self.current.plan

    def train_one(
        self,
        noise_NCHW: Tensor,
        condition_N: Any,
        keys: SampleKeys,
        average: Callable[[Tensor], None] = average,
    ) -> dict[str, float]:
        """One trajectory of the current member; the metrics to log."""
        metrics = self.current.train_one(noise_NCHW, condition_N, keys, average)
        if len(self.members) > 1:
            metrics["target_speedup"] = self.current.target.speedup
        if not self.next_rows and self._place + 1 < len(self.members):
            self._go_on()
        return metrics

    def _go_on(self) -> None:
        self._place += 1
        self.current.start_as(self.members[0])

    def state(self) -> dict[str, Any]:
        return {"members": [member.state() for member in self.members[: self._place + 1]]}

    def load_state(self, state: dict[str, Any]) -> None:
        self._place = 0
        for place, kept in enumerate(state["members"]):
            if place:
                self._go_on()
            self.current.load_state(kept)

    def artifact(self, **provenance: Any) -> RouterArtifact:
        """The first member's: the router of `train.target_speedup`."""
        return self.members[0].artifact(**provenance)

    def extra_artifacts(self, **provenance: Any) -> dict[str, RouterArtifact]:
        """The other members', by the speed that each was trained for, as in "1.5x"."""
        return {
            target_name(target): member.artifact(**provenance | {"target_speedup": target})
            for target, member in zip(self.config.extra_targets, self.members[1:], strict=True)
        }


def target_configs(config: TrainingConfig) -> list[TrainingConfig]:
    """Of each member, the first one's first."""
    alone = dataclasses.replace(config, targets=())
    return [alone] + [config.for_target(target_speedup=target) for target in config.extra_targets]


def family_phases(config: TrainingConfig, num_steps: int) -> tuple[Phase, ...]:
    """Those of a whole training: the start, which is shared, and then each member's own."""
    phases: list[Phase] = []
    for place, one in enumerate(target_configs(config)):
        own = phases_of(one, num_steps, target=one.target_speedup if config.extra_targets else 0.0)
        phases += [phase for phase in own if place == 0 or phase.name != "start"]
    return tuple(phases)


def target_name(target: float) -> str:
    """Of a family's member: its folder, its variant, its part of a version's tags."""
    return f"{target:g}x"
