"""Replace a transformer's forward: each call is a step of a plan."""

import copy
import logging
import types
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from harmonica.core.cache import BranchCache, Reuse
from harmonica.core.passes import planned_pass
from harmonica.core.plan import Plan
from harmonica.core.segments import units_of
from harmonica.execution.graphs import GraphStore
from harmonica.integrations.compiled_modules import any_compiled
from harmonica.integrations.graphed_steps import GraphedSteps
from harmonica.integrations.pipeline_transformer import Call, PipelineTransformer
from harmonica.integrations.scheduler_guard import SecondCallError
from harmonica.integrations.step_tracker import StepCounter
from harmonica.integrations.timestep_reader import TimestepReader, read_all
from harmonica.integrations.trajectory_claim import TrajectoryClaim
from harmonica.models.base import Branch, BranchedTransformer, Execution
from harmonica.models.compiler_check import compiler_fault

logger = logging.getLogger(__name__)

PipelineExecution = Literal["auto", "eager", "compiled", "graphed"]
"""How branches are run in a pipeline; `auto` records graphs on CUDA."""


def _step(
    view: BranchedTransformer,
    units: Sequence[Branch],
    row: Sequence[bool],
    cache: BranchCache,
    step: int,
    inputs: tuple[Any, ...],
) -> Tensor:
    """Compute the model's output under one row of the plan; this is compiled."""
    hidden, conditioning = view.embed(*inputs)
    return planned_pass(view, hidden, conditioning, row, cache, step, units=units)


def _step_of_its_own(name: str) -> Any:
    """Return `_step` with its own code object: Dynamo allows eight graphs for each."""
    step = cast(types.FunctionType, _step)
    return types.FunctionType(step.__code__.replace(co_name=name), step.__globals__, name)


class PlannedForward:
    """Runs a trajectory call by call and frees its tensors at the last step.

    A trajectory belongs to the pipeline's call that began it. Copies and pickles begin with none.
    """

    def __get__(self, *_: Any) -> "PlannedForward":
        """Return itself when bound to a transformer, as cache-dit does on removal."""
        return self

    def __init__(
        self,
        model: PipelineTransformer,
        plan: Plan,
        reuse: Reuse,
        steps: StepCounter,
        execution: PipelineExecution = "eager",
    ) -> None:
        self._model, self._plan, self._reuse, self._steps = model, plan, reuse, steps
        self._execution = execution
        self._set_up()

    def _set_up(self) -> None:
        self._units, self._rows = units_of(self._model.view, self._plan)
        steps = range(self._plan.num_steps)
        self._graphs = {self._graph(i): _step_of_its_own(f"plan_step_{i}") for i in steps}
        self._graphed = GraphedSteps(self._model, self._step_at, self._new_cache, self._plan.num_steps)
        self._is_replayed = False
        self._said = set[str]()
        self._cache: BranchCache | None = None
        self._shape: tuple[int, ...] = ()
        self._claim = TrajectoryClaim()
        self._timesteps = TimestepReader()

    def __getstate__(self) -> dict[str, Any]:
        steps = copy.copy(self._steps)
        steps.reset()
        kept = {"_model": self._model, "_plan": self._plan, "_reuse": self._reuse, "_steps": steps}
        return kept | {"_execution": self._execution}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._set_up()

    def _graph(self, i: int) -> Hashable:
        """Return the key of a step's compiled graph: forecasts differ in each step."""
        return self._plan.compute[i] if self._reuse == "hold" else i

    @property
    def recordings(self) -> GraphStore:
        """The recorded trajectories, where steps are replayed."""
        return self._graphed.store

    def _new_cache(self) -> BranchCache:
        return BranchCache.under(self._rows, self._reuse)

    @torch.compiler.disable
    def _step_at(self, i: int, cache: BranchCache, inputs: tuple[Any, ...]) -> Callable[[], Tensor]:
        """Return what computes the model's output at step i (N, out_channels, H, W)."""
        # To hold, the cache need not know the step, and as a number it would be compiled in.
        step = i if self._reuse == "forecast" else 0
        row, run = self._rows.compute[i], self._graphs[self._graph(i)]
        return partial(run, self._model.view, self._units, row, cache, step, inputs)

    @torch.compiler.disable
    def _replay(self, i: int, call: Call) -> Tensor:
        return self._graphed.step(i, call)

    # Not recursive: Dynamo skips this frame and its helpers, and compiles the step between them.
    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one step, with the arguments of the transformer's own forward.

        Raises:
            ValueError: the call is not the plan's next one, comes while another runs, or asks for what
                branches do not give.
        """
        try:
            i, call, run = self._enter(args, kwargs)
            output_NCHW = run()
            if i == 0:
                self._check_timesteps()
        except SecondCallError:
            raise
        except BaseException:
            self.reset()
            raise
        return self._leave(i, call, output_NCHW)

    @torch.compiler.disable
    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, Call, Callable[[], Tensor]]:
        """Return the call's step, and what computes its output."""
        call = self._model.read(*args, **kwargs)
        timestep = self._timesteps.read(call.given_timestep_N, self._expected_timestep)
        self._claim.take(lambda *_: self._steps.begins(timestep))
        i = self._steps.next_step(timestep)
        shape = tuple(call.sample_NCHW.shape)
        if i == self._plan.num_steps - 1:
            self._model.check()  # hooks, adapters and attention processors can have come since
            self._cache, self._shape = self._new_cache(), shape
            execution = self._execution_on(call.sample_NCHW.device)
            self._model.view.execution = "eager" if execution == "eager" else "compiled"
            self._is_replayed = execution == "graphed" and self._graphed.begin(call)
        elif shape != self._shape:
            raise ValueError(
                f"hidden_states has shape {shape} and the trajectory began with {self._shape}: a batch stays "
                "as it is for all its steps, run the other after it"
            )
        if self._is_replayed:
            return i, call, partial(self._replay, i, call)
        assert self._cache is not None, "the first step has made it"
        inputs = call.sample_NCHW, call.timestep_N, self._model.condition(call.arguments)
        return i, call, self._step_at(i, self._cache, inputs)

    def _expected_timestep(self) -> float | None:
        """Return the next step's timestep, within the call that began the trajectory."""
        return self._steps.expected if self._claim.is_callers() else None

    @torch.compiler.disable
    def _check_timesteps(self) -> None:
        """Compare the timesteps that were assumed; waits for the device.

        Raises:
            ValueError: one was another.
        """
        wanted = [each for each, _ in self._timesteps.postponed]
        found = read_all([each for _, each in self._timesteps.postponed])
        self._timesteps.forget()
        for one, other in zip(wanted, found, strict=True):
            if one != other:
                raise self._steps.mismatch(other, one)

    def _execution_on(self, device: torch.device) -> Execution:
        if self._execution != "eager" and (hook := self._model.moving_hook()):
            if hook not in self._said:
                self._said.add(hook)
                logger.warning(
                    "steps are not compiled: transformer has the hook %s, which moves weights", hook
                )
            return "eager"
        if self._execution == "auto":
            return "graphed" if device.type == "cuda" and not compiler_fault("cuda") else "eager"
        is_eager = self._execution == "eager" and not any_compiled(self._model.blocks)
        return "eager" if is_eager else "graphed" if self._execution == "graphed" else "compiled"

    @torch.compiler.disable
    def _leave(self, i: int, call: Call, output_NCHW: Tensor) -> Any:
        if i == 0:
            self._forget()
            self._claim.release()
        if not call.arguments["return_dict"]:
            return (output_NCHW,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output_NCHW)

    def end_of_call(self, *_: Any, **__: Any) -> None:
        """End the trajectory; called when the pipeline has its images.

        Raises:
            ValueError: before the plan's last step, where steps are only counted and the pipeline was not
                interrupted: it has other steps than the router.
        """
        calls = self._steps.calls
        try:
            if self._claim.is_callers():
                self._check_timesteps()
        except ValueError:
            self.reset()
            raise
        if self.reset():
            self._claim.check_end(calls, self._plan.num_steps, is_checked=self._steps.is_checked)

    @torch.compiler.disable
    def reset(self) -> bool:
        """Drop the trajectory unless another thread owns it; returns whether it is gone."""

        def forget() -> None:
            self._forget()
            self._steps.reset()

        return self._claim.drop(forget)

    def _forget(self) -> None:
        self._model.forget()
        self._graphed.forget()
        self._timesteps.forget()
        self._cache, self._shape = None, ()
