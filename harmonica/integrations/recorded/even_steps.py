"""Describe evenly spread steps, a plan that needs no training."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from harmonica.core.plan import Plan
from harmonica.core.plan_builders import even_plan, fastest_speedup, with_fixed_correction
from harmonica.integrations.recorded.kinds import BLOCKS, check_kinds
from harmonica.models.base import Macs
from harmonica.validation.settings import require

_NAME = re.compile(r"even-(\d+(?:\.\d+)?)x")
_SHARE, _SHARE_OF_FLOW_MATCHING = 0.5, 0.75


@dataclass(frozen=True, kw_only=True)
class EvenSteps:
    """A plan that needs no training: evenly spread steps are reused.

    Values are forecast linearly, and the outputs of computed steps corrected by what they show of the reused
    ones before them (`harmonica.core.plan_builders.with_fixed_correction`). The number of steps may change
    from call to call. A trained router is nearer to the full images at the same speed.

    Raises:
        ValueError: a field that makes no sense, with what to give.
    """

    speedup: float = 1.8
    """How many times less arithmetic the transformer does, above 1. Steps are reused as a whole, so speeds
    come in jumps."""
    cacheable: Sequence[str] = (BLOCKS,)
    """What is reused: all blocks as one, which keeps one value a call; or kinds of sub-modules: attn, cross,
    mlp, single."""
    correction: float | None = None
    """Share of what reused steps lack that the next computed one makes up for, 0 to 1. None takes 0.75 where
    the pipeline's scheduler is of flow matching and 0.5 elsewhere (tests/benchmarks/RESULTS.md)."""
    num_inference_steps: int | None = None
    """Number of steps of a loop of your own; None reads it from the pipeline that runs, at each call."""

    def __post_init__(self) -> None:
        if not self.speedup > 1:
            raise ValueError(f"speedup is {self.speedup}: give a number above 1, such as 1.8")
        check_kinds(self.cacheable)
        if self.correction is not None and not 0 <= self.correction <= 1:
            raise ValueError(f"correction is {self.correction}: give a share from 0 to 1, or None")
        if self.num_inference_steps is not None and self.num_inference_steps < 2:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}: give 2 or more, or None")

    @classmethod
    def named(cls, router: str) -> Self | None:
        """Return the evenly spread steps that `even-1.8x` asks for in place of a router.

        Returns:
            None where the name is of another form, such as a folder.

        Raises:
            SettingError: the speed is not above 1.
        """
        if (found := _NAME.fullmatch(router)) is None:
            return None
        speedup = float(found[1])
        require(speedup > 1, "router", router, "give a speed above 1, such as even-1.8x")
        return cls(speedup=speedup)

    def plan(self, num_steps: int, macs: Macs, *, is_flow_matching: bool = False) -> Plan:
        """Return the plan for a number of steps.

        Args:
            macs: of one call of the transformer.
            is_flow_matching: whether the scheduler is.

        Raises:
            ValueError: so few steps do not reach the speed.
        """
        if self.speedup > (most := fastest_speedup(num_steps, macs)):
            raise ValueError(
                f"speedup is {self.speedup}: {num_steps} steps of this transformer reach {most:.2f} at most: "
                f"give {'more steps' if num_steps == 1 else 'at most that, or more steps'}"
            )
        share = self.correction
        if share is None:
            share = _SHARE_OF_FLOW_MATCHING if is_flow_matching else _SHARE
        plan = even_plan(num_steps, macs, self.speedup, is_flow_matching=is_flow_matching)
        return with_fixed_correction(plan, share) if share else plan

    def nearest_plan(self, num_steps: int, macs: Macs, *, is_flow_matching: bool = False) -> Plan:
        """Return the plan for a number of steps, or the fastest one.

        That is where so few steps do not reach the speed. A pipeline may make a single step, to warm up or
        since little is left to do to a picture.
        """
        if num_steps == 1:
            return Plan.full(1, len(macs.branches))
        even = replace(self, speedup=min(self.speedup, fastest_speedup(num_steps, macs)))
        return even.plan(num_steps, macs, is_flow_matching=is_flow_matching)


def is_flow_matching(scheduler: Any) -> bool:
    """Return whether a diffusers scheduler's steps are those of flow matching."""
    config = getattr(scheduler, "config", {})
    by_setting = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(by_setting) or type(scheduler).__name__.startswith("FlowMatch")
