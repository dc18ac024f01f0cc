"""Replay a pipeline's steps from CUDA graphs.

A trajectory of a shape is run when it comes first, and recorded when it comes again: all of its steps at its
first call. From then on each call fills the buffers and replays its step. The pipeline's own part of a step,
guidance and scheduler, runs between the replays.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.core.cache import BranchCache
from harmonica.core.graphed_sampling import condition_of, condition_tensors
from harmonica.execution.graphs import GraphStore, RecordedTrajectory, addresses_of
from harmonica.integrations.pipeline_transformer import Call, KeptValue, PipelineTransformer

StepMaker = Callable[[int, BranchCache, tuple[Any, ...]], Callable[[], Tensor]]
"""Returns what computes the output of step i from a cache and the inputs of the view's `embed`."""


class GraphedSteps:
    """Holds the recordings of one plan on one transformer, and replays them."""

    def __init__(
        self,
        model: PipelineTransformer,
        make_step: StepMaker,
        make_cache: Callable[[], BranchCache],
        num_steps: int,
    ) -> None:
        """Record nothing yet.

        Args:
            make_cache: returns an empty cache for a trajectory.
        """
        self._model, self._make_step, self._make_cache, self._num_steps = (
            model,
            make_step,
            make_cache,
            num_steps,
        )
        self.store = GraphStore(model.view.graph_bytes, cure="give execution='compiled'")
        self._raw = KeptValue()
        self.forget()

    def forget(self) -> None:
        """End the trajectory; its recording stays."""
        self._recorded: RecordedTrajectory | None = None
        self._raw.forget()
        self._filled = 0

    def begin(self, call: Call) -> bool:
        """Begin a trajectory with its first call.

        Returns:
            Whether its steps are recorded; else they are to be run.

        Raises:
            ValueError: an argument that the branches do not take.
        """
        self.forget()
        raw = self._raw_condition(call)
        given = [call.sample_NCHW, call.timestep_N, *condition_tensors(raw)]
        if torch.is_grad_enabled():
            self.store.say_once("gradients are on, call the pipeline under torch.no_grad()")
            return False
        if torch.is_autocast_enabled(call.sample_NCHW.device.type):
            self.store.say_once("torch.autocast is on, load the weights in its precision instead")
            return False
        with torch.inference_mode(False), torch.no_grad():
            self._recorded = self.store.find(self._key(given), partial(self._record, raw, given))
            if self._recorded is not None:
                self._recorded.begin(given)
                self._project()
        return self._recorded is not None

    def step(self, i: int, call: Call) -> Tensor:
        """Replay step i; returns the model's output (N, out_channels, H, W).

        Raises:
            ValueError: an argument that the branches do not take.
        """
        raw, recorded = self._raw_condition(call), self._recorded
        assert recorded is not None, "begin has found it"
        with torch.inference_mode(False), torch.no_grad():
            recorded.fill([call.sample_NCHW, call.timestep_N])
            if self._raw.times_made != self._filled:
                recorded.fill(condition_tensors(raw), first=2)
                self._project()
            recorded.replays[self._num_steps - i]()
            output_NCHW: Tensor = recorded.results[self._num_steps - i]
            return output_NCHW.clone()

    def _raw_condition(self, call: Call) -> Any:
        sources = self._model.sources(call.arguments)
        return self._raw.get(sources, lambda: self._model.raw_condition(call.arguments))

    def _project(self) -> None:
        """Replay what the condition is prepared by, from the buffers that hold it."""
        assert self._recorded is not None, "begin has found it"
        self._recorded.replays[0]()
        self._filled = self._raw.times_made

    def _key(self, given: Sequence[Tensor]) -> Hashable:
        """Return all that a recording holds as constants."""
        transformer: nn.Module = self._model.transformer
        kinds = tuple((tuple(each.shape), each.dtype) for each in given)
        place = (str(given[0].device), addresses_of(transformer), transformer.training)
        return kinds, place, tuple(_adapter_states(transformer))

    def _record(self, raw: Any, given: Sequence[Tensor]) -> RecordedTrajectory:
        # Not padded to fewer sizes: a pipeline's batch seldom changes.
        recorded = RecordedTrajectory.on(self._model.transformer, given, len(given[0]))
        recorder, buffers = recorded.recorder, recorded.inputs
        with recorder.recording():
            recorder.warm_up(lambda: [step() for step in self._steps(raw, buffers)])
            recorded.record(list(self._steps(raw, buffers)))
        return recorded

    def _steps(self, raw: Any, buffers: Sequence[Tensor]) -> Iterator[Callable[[], Any]]:
        """Yield what prepares the condition, then the steps from T-1 down."""
        sample_NCHW, timestep_N, *others = buffers
        cache, projected = self._make_cache(), list[Any]()
        yield lambda: projected.append(self._model.project(condition_of(raw, others)))
        for i in reversed(range(self._num_steps)):
            yield partial(self._run, i, cache, sample_NCHW, timestep_N, projected)

    def _run(
        self, i: int, cache: BranchCache, sample: Tensor, timestep: Tensor, projected: list[Any]
    ) -> Tensor:
        return self._make_step(i, cache, (sample, timestep, projected[0]))()


def _adapter_states(transformer: nn.Module) -> Iterator[Hashable]:
    """Yield which adapters (PEFT's) are on in each layer, and how strong they are."""
    for module in transformer.modules():
        if isinstance(scaling := getattr(module, "scaling", None), dict):
            switches = [getattr(module, each, None) for each in ("disable_adapters", "active_adapters")]
            yield str(switches), str(getattr(module, "merged_adapters", None)), str(scaling)
