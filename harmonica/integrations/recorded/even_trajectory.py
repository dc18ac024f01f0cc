"""Put evenly spread steps on a pipeline's transformers, without training."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from harmonica.core.plan import Plan
from harmonica.core.plan_builders import fastest_speedup
from harmonica.integrations.call_owner import current_pipeline
from harmonica.integrations.pipeline_transformer import refuse_other_caches
from harmonica.integrations.recorded.call_tracker import steps_of
from harmonica.integrations.recorded.even_steps import EvenSteps, is_flow_matching
from harmonica.integrations.recorded.planned_trajectory import TrajectoryByPlan
from harmonica.integrations.recorded.trajectory import TransformerCall
from harmonica.integrations.recorded.unit_store import UnitStore
from harmonica.integrations.recorded.view import RecordedTransformer
from harmonica.integrations.recorded.views import views_of

logger = logging.getLogger(__name__)


def even_calls(
    transformers: Sequence[nn.Module], forwards: Sequence[Any], even: EvenSteps, *, is_compiled: bool = False
) -> Iterator[TransformerCall]:
    """Yield the call that replaces each transformer's forward.

    Raises:
        ValueError: another cache is on.
    """
    for transformer in transformers:
        refuse_other_caches(transformer)
    views = views_of(transformers, forwards, cacheable=even.cacheable, is_compiled=is_compiled)
    return EvenTrajectory(views, even).calls()


class EvenTrajectory(TrajectoryByPlan):
    """Follows the plan for the number of steps that the running pipeline makes."""

    def __init__(self, views: Sequence[RecordedTransformer], even: EvenSteps) -> None:
        """Wait for the first step."""
        super().__init__(views, even.num_inference_steps or 1, reuse="forecast")
        self._even = even
        self._is_flow_matching = False
        self._plans: dict[tuple[RecordedTransformer, int, bool], Plan] = {}

    def _begin(self) -> None:
        pipe = current_pipeline()
        steps = self._even.num_inference_steps or (None if pipe is None else steps_of(pipe))
        if steps is None:
            raise ValueError(
                "no diffusers pipeline runs that says how many steps it makes: give num_inference_steps to "
                "EvenSteps"
            )
        self.num_steps = self.tracker.num_steps = steps
        self._is_flow_matching = is_flow_matching(getattr(pipe, "scheduler", None))
        super()._begin()

    def plan_of(self, view: RecordedTransformer) -> Plan:
        key = (view, self.num_steps, self._is_flow_matching)
        if key not in self._plans:
            macs = view.macs()
            plan = self._even.nearest_plan(self.num_steps, macs, is_flow_matching=self._is_flow_matching)
            self._plans[key] = plan
            reused = sum(not any(row) for row in plan.compute)
            is_met = plan.cur and self._even.speedup <= fastest_speedup(self.num_steps, macs)
            tell = logger.info if is_met else logger.warning
            tell(
                "evenly spread steps: %d of %d are reused, for %.2f times less arithmetic",
                *(reused, self.num_steps, plan.ideal_speedup(macs)),
            )
        return self._plans[key]

    def new_kept(self, view: RecordedTransformer) -> UnitStore:
        return view.new_kept("forecast", None, self.plan_of(view).correction)

    def ideal_speedup(self) -> float:
        """Return how many times less arithmetic the last call of the pipeline took."""
        view = self.views[0]
        return self.plan_of(view).ideal_speedup(view.macs())
