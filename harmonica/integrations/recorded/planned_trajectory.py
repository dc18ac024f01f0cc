"""Run the trajectory of a pipeline's transformers under a plan."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.integrations.recorded.trajectory import CallTrajectory
from harmonica.integrations.recorded.transformer_step import TransformerStep
from harmonica.integrations.recorded.view import RecordedTransformer


class TrajectoryByPlan(CallTrajectory):
    """Computes, reuses or skips units as a plan's row of a step says.

    A call whose values are not there computes everything: a second transformer's first call, and one of a
    batch that has shrunk.
    """

    @abstractmethod
    def plan_of(self, view: RecordedTransformer) -> Plan:
        """Return the plan that a recorded transformer follows."""

    def compute(self, step: TransformerStep) -> Any:
        if not len(step.kept):
            return step.full()
        return step.planned(self.plan_of(step.view).compute[step.i])


class PlannedTrajectory(TrajectoryByPlan):
    """Follows one plan, which all transformers share."""

    def __init__(
        self,
        views: Sequence[RecordedTransformer],
        plan: Plan,
        reuse: Reuse,
        *,
        check_view: Callable[[RecordedTransformer], None],
        check_pipeline: Callable[[Any], None],
    ) -> None:
        """Wait for the first step.

        Args:
            check_view: refuses branches that are not the plan's, when they have been recorded.
            check_pipeline: refuses a pipeline whose scheduler is not the plan's.
        """
        super().__init__(
            views,
            plan.num_steps,
            reuse=reuse,
            learned=(plan.forecast, plan.correction),
            check_view=check_view,
            check_pipeline=check_pipeline,
        )
        self.plan = plan

    def plan_of(self, view: RecordedTransformer) -> Plan:
        return self.plan
