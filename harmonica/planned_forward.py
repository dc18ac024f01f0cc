"""What stands in for the forward of a pipeline's transformer: one step of a plan a call."""

import types
from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from harmonica.cache import BranchCache, Reuse
from harmonica.models.base import BranchedTransformer
from harmonica.models.pipeline_transformer import Call, PipelineTransformer
from harmonica.passes import planned_pass
from harmonica.plan import Plan
from harmonica.step_counter import StepCounter


def _step(
    view: BranchedTransformer, row: Sequence[bool], cache: BranchCache, step: int, inputs: tuple[Any, ...]
) -> Tensor:
    """All that is compiled: the model's output under one row of the plan."""
    hidden, conditioning = view.embed(*inputs)
    return planned_pass(view, hidden, conditioning, row, cache, step)


def _step_of_its_own(name: str) -> Any:
    """`_step` under a code object of its own: Dynamo counts graphs by code, and gives up at eight."""
    step = cast(types.FunctionType, _step)
    return types.FunctionType(step.__code__.replace(co_name=name), step.__globals__, name)


class PlannedForward:
    """Follows a trajectory call by call; its tensors are let go of at the last step."""

    def __init__(self, model: PipelineTransformer, plan: Plan, reuse: Reuse, steps: StepCounter) -> None:
        self._model, self._plan, self._reuse, self._steps = model, plan, reuse, steps
        self._graphs = {self._graph(i): _step_of_its_own(f"plan_step_{i}") for i in range(plan.num_steps)}
        self._cache: BranchCache | None = None
        self._shape: tuple[int, ...] = ()

    def _graph(self, i: int) -> Hashable:
        """Steps of one key share their compiled graph: a forecast's weights differ from step to step."""
        return self._plan.compute[i] if self._reuse == "hold" else i

    # Not recursive: Dynamo skips this frame and the two helpers, and compiles the step between them.
    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the transformer's own.

        Raises:
            ValueError: the call is not the plan's next one, or asks for what branches do not give.
        """
        try:
            i, call, inputs = self._enter(args, kwargs)
            # To hold, the cache need not know the step, and as a number it would be compiled in.
            step = i if self._reuse == "forecast" else 0
            row = self._plan.compute[i]
            output_NCHW = self._graphs[self._graph(i)](self._model.view, row, self._cache, step, inputs)
        except BaseException:
            self._reset()
            raise
        return self._leave(i, call, output_NCHW)

    @torch.compiler.disable
    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, Call, tuple[Any, ...]]:
        call = self._model.read(*args, **kwargs)
        timesteps = set(call.timestep_N.tolist())
        if len(timesteps) != 1:
            raise ValueError(f"timestep is {sorted(timesteps)}: a plan has one step for the whole batch")
        i = self._steps.next_step(timesteps.pop())
        shape = tuple(call.sample_NCHW.shape)
        if i == self._plan.num_steps - 1:
            self._model.check()  # hooks, adapters and attention processors can have come since
            self._cache = BranchCache(self._plan.num_branches, self._reuse, self._plan.forecast)
            self._shape = shape
        elif shape != self._shape:
            raise ValueError(
                f"hidden_states has shape {shape} and the trajectory began with {self._shape}: a batch stays "
                "as it is for all its steps, run the other after it"
            )
        return i, call, (call.sample_NCHW, call.timestep_N, self._model.condition(call.arguments))

    @torch.compiler.disable
    def _leave(self, i: int, call: Call, output_NCHW: Tensor) -> Any:
        if i == 0:
            self._release()
        if not call.arguments["return_dict"]:
            return (output_NCHW,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output_NCHW)

    def end_of_call(self, *_: Any, **__: Any) -> None:
        """The pipeline has its images.

        Raises:
            ValueError: before the plan's last step.
        """
        calls, wanted = self._steps.calls, self._plan.num_steps
        self._reset()
        if calls:
            raise ValueError(
                f"the pipeline ended after {calls} of the router's {wanted} steps: give it "
                f"num_inference_steps {wanted}"
            )

    def _release(self) -> None:
        self._cache, self._shape = None, ()
        self._model.forget()

    def _reset(self) -> None:
        self._release()
        self._steps.reset()
