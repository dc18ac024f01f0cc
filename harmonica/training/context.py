"""The state shared by the phases of one router's training.

It holds the router, the optimiser, the target and the starts.
"""

from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from harmonica.core.plan import Plan
from harmonica.core.router import FIXED_LOGIT, Router
from harmonica.core.segments import with_segments
from harmonica.training.backend import TrajectoryBackend
from harmonica.training.config import TrainingConfig
from harmonica.training.plans.search import StepSearch, initial_router
from harmonica.training.sdt import SdtTrainer
from harmonica.training.target import TargetController


@dataclass(slots=True)
class TrainingContext:
    """One router in training, with the state that several phases read or change."""

    backend: TrajectoryBackend
    config: TrainingConfig
    sdt: SdtTrainer
    """The router and its optimiser."""
    target: TargetController
    """The controller of the target; it sets beta and the threshold of plans."""
    starts: dict[str, Tensor]
    """Logits (T, B) of the plans that need no training, by name."""
    search: StepSearch | None = None
    """The search that the starts come from, where they are measured."""
    chosen: str = ""
    """Name of the selected plan, whose images are nearest to the full sampler's; "" until it is known."""
    finalists: dict[str, Tensor] = field(default_factory=dict)
    """Logits (T, B) of the selected plan and of the nearest others, by name, until one of them is fitted."""

    found: dict[str, float] = field(default_factory=dict)
    """What `train.target_psnr` has led to: reused steps, PSNR and speed; empty until it is known."""

    @classmethod
    def create(
        cls, backend: TrajectoryBackend, config: TrainingConfig, seed: int, device: torch.device | str
    ) -> Self:
        """Return the context of a training that has not begun."""
        router = initial_router(backend, config, seed).to(device)
        sdt = SdtTrainer(backend.sampler, router, config.sdt)
        with torch.no_grad():
            for i, row in enumerate(router.rows):
                if not sdt.trains(i):
                    row.fill_(FIXED_LOGIT)
        return cls(backend, config, sdt, TargetController(sdt, config), {"start": router.logits()})

    @property
    def sampler(self) -> Any:
        """Return an object with `num_steps`, and a `model` with `branches` and `macs()`."""
        return self.backend.sampler

    @property
    def router(self) -> Router:
        """Return the router that is trained."""
        return self.sdt.router

    @property
    def device(self) -> torch.device:
        """Return the device of the router's logits."""
        device: torch.device = self.router.rows[0].device
        return device

    @property
    def has_segments(self) -> bool:
        """Return whether learned forecasts are of segments."""
        forecast = self.config.forecast
        return forecast.segments and forecast.trajectories > 0 and self.backend.has_segments

    @property
    def cures(self) -> list[str]:
        """Return what to give where a trajectory's gradients do not fit."""
        forecast = self.config.forecast
        can_have = self.backend.has_segments and forecast.trajectories > 0 and not forecast.segments
        return ["train.forecast.segments True"] * can_have + forecast.cures

    def in_segments(self, plan: Plan) -> Plan:
        """Return a plan with segments, if learned forecasts are of these."""
        return with_segments(plan, self.sampler.model) if self.has_segments else plan

    @property
    def plan(self) -> Plan:
        """Return the router's present plan, with linear forecasts."""
        return self.target.plan_of(self.router.logits())

    @torch.no_grad()
    def set_router(self, logits_TB: Tensor) -> None:
        """Set the router's logits (T, B); the optimiser's state does not change."""
        for row, logits_B in zip(self.router.rows, logits_TB, strict=True):
            row.copy_(logits_B)

    @property
    def found_message(self) -> str:
        """Return what `train.target_psnr` has led to, in a line; "" if nothing is known."""
        if not self.found:
            return ""
        steps, psnr, speedup = (self.found[name] for name in ("reused_steps", "psnr", "macs_speedup"))
        return (
            f"train.target_psnr is {self.config.target_psnr:g}: the fastest start that has it reuses "
            f"{steps:g} of {self.sampler.num_steps} steps, at {psnr:.1f} dB and {speedup:.3g}x in MACs"
        )

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint; the key "aim" holds the target's."""
        return {
            "router": self.router.state_dict(),
            "optimizer": self.sdt.optimizer.state_dict(),
            "aim": self.target.state(),
            "starts": self.starts,
            "chosen": self.chosen,
            **({"finalists": self.finalists} if self.finalists else {}),
            **({"found": self.found} if self.found else {}),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned."""
        self.router.load_state_dict(state["router"])
        self.sdt.optimizer.load_state_dict(state["optimizer"])
        finalists = state.get("finalists", {})  # newer than some checkpoints
        self.starts, self.finalists = (
            {name: logits_TB.to(self.device) for name, logits_TB in found.items()}
            for found in (state["starts"], finalists)
        )
        self.chosen, self.found = state["chosen"], state.get("found", {})
        self.target.load_state(state["aim"])
