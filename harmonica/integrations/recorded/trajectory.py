"""Hold a trajectory's state: its owner, its step and its kept values."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from harmonica.core.cache import Reuse
from harmonica.core.plan import Correction, Forecast
from harmonica.integrations.call_owner import current_pipeline
from harmonica.integrations.pipeline_transformer import refuse_other_caches
from harmonica.integrations.recorded.call_tracker import (
    CallKey,
    CallTracker,
    place_in_pipeline,
    steps_of,
)
from harmonica.integrations.recorded.kinds import is_no_step
from harmonica.integrations.recorded.transformer_step import TransformerStep
from harmonica.integrations.recorded.unit_store import UnitStore
from harmonica.integrations.recorded.view import RecordedTransformer
from harmonica.integrations.scheduler_guard import SecondCallError
from harmonica.integrations.trajectory_claim import TrajectoryClaim

_TIMESTEPS = (  # the arguments' names in diffusers
    *("timestep", "timesteps", "t", "decoder_noise_time", "vision_timesteps", "bb_ca_time"),
)


class CallTrajectory(ABC):
    """Holds the state of one trajectory for all transformers of a pipeline.

    Each call of a step has values of its own: the conditional and the unconditional one, and those of each
    transformer. They begin anew where a call's inputs have another shape than at the step before, as they
    do when a batch shrinks on the way, or other switches, as where the first step fills a cache of keys and
    values that later ones read.
    """

    def __init__(
        self,
        views: Sequence[RecordedTransformer],
        num_steps: int,
        *,
        reuse: Reuse,
        learned: tuple[Forecast | None, Correction | None] = (None, None),
        check_view: Callable[[RecordedTransformer], None] | None = None,
        check_pipeline: Callable[[Any], None] | None = None,
    ) -> None:
        """Wait for the first call of a trajectory.

        Args:
            reuse: what a reused branch hands out.
            learned: the weights of forecasts, if they are not linear, and of the output's correction.
            check_view: refuses a transformer, when it is first called.
            check_pipeline: refuses a pipeline, at the first step of a trajectory.
        """
        self.views, self.num_steps = list(views), num_steps
        self.reuse, self.learned = reuse, learned
        self._check_view, self._check_pipeline = check_view, check_pipeline
        self._checked: set[int] = set()  # views, which several plans may share
        self.tracker = CallTracker(num_steps)
        self._set_up()

    def _set_up(self) -> None:
        self.claim = TrajectoryClaim()
        self._contexts = [""] * len(self.views)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("claim", "tracker", "_contexts", "_kept", "_shapes", "_inputs")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.tracker = CallTracker(self.num_steps)
        self._set_up()

    def _forget(self) -> None:
        self._kept: dict[CallKey, UnitStore] = {}
        self._shapes: dict[CallKey, dict[str, Any]] = {}
        self._inputs: dict[CallKey, list[Any]] = {}

    def calls(self) -> Iterator["TransformerCall"]:
        """Yield the call that replaces each transformer's forward."""
        return (TransformerCall(self, number) for number in range(len(self.views)))

    def forward(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of a transformer's forward.

        Raises:
            ValueError: the pipeline has other steps than the trajectory, or a second call comes meanwhile.
        """
        try:
            return self._forward(number, args, kwargs)
        except SecondCallError:
            raise
        except BaseException:
            self.reset()
            raise

    def _forward(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        view = self.views[number]
        if is_no_step(view.transformer, kwargs):
            return view.forward(*args, **kwargs)
        place = place_in_pipeline(lambda: _timesteps(view, args, kwargs))
        if self.claim.take(lambda is_other: is_other or self.tracker.begins(place)):
            self._begin()
        i, key = self.tracker.locate(place, number, self._contexts[number])
        if not view.is_recorded:
            view.record(*args, **kwargs)
        if number not in self._checked and self._check_view is not None:
            self._check_view(view)
            self._checked.add(number)
        inputs = _kind_of_inputs(args, kwargs)
        if self._inputs.get(key) != inputs:
            self._kept[key] = self.new_kept(view)
            self._shapes[key], self._inputs[key] = {}, inputs
        return self.compute(TransformerStep(view, i, self._kept[key], self._shapes[key], args, kwargs))

    def new_kept(self, view: RecordedTransformer) -> UnitStore:
        """Return the empty values of one of the trajectory's calls."""
        return view.new_kept(self.reuse, *self.learned)

    @abstractmethod
    def compute(self, step: TransformerStep) -> Any:
        """Return what a call gives the pipeline."""

    def _begin(self) -> None:
        """Begin a trajectory.

        Raises:
            ValueError: another cache has come since, or the pipeline that runs has another number of steps.
        """
        self.tracker.reset()
        self._forget()
        for view in self.views:
            refuse_other_caches(view.transformer)
            view.follow_modules()
        pipe, wanted = current_pipeline(), self.num_steps
        if pipe is None:
            return
        if self._check_pipeline is not None:
            self._check_pipeline(pipe)
        steps = steps_of(pipe)
        if steps is not None and steps != wanted:
            raise ValueError(
                f"the pipeline is to make {steps} steps and the router was made for {wanted}: give it "
                f"num_inference_steps {wanted}, and a scheduler with one call a step"
            )

    @contextmanager
    def context(self, number: int, name: str, entered: Any) -> Iterator[None]:
        """Name the calls of a transformer while a pipeline's `cache_context` is open."""
        self._contexts[number] = name
        try:
            with entered:
                yield
        finally:
            self._contexts[number] = ""

    def end_of_call(self, *_: Any, **__: Any) -> None:
        """End the trajectory; called when the pipeline has its images.

        Raises:
            ValueError: before the last step, where the pipeline was not interrupted.
        """
        steps = self.tracker.unfinished
        if self.reset():
            self.claim.check_end(steps, self.num_steps, is_checked=False)

    def reset(self) -> bool:
        """Drop the trajectory unless another thread owns it; returns whether it is gone."""

        def forget() -> None:
            self._forget()
            self.tracker.reset()

        return self.claim.drop(forget)


class TransformerCall:
    """Replaces a transformer's forward by a call in a trajectory."""

    def __init__(self, trajectory: CallTrajectory, number: int) -> None:
        self.trajectory, self.number = trajectory, number

    def __get__(self, *_: Any) -> "TransformerCall":
        """Return itself when something binds it, as diffusers' hooks do."""
        return self

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.trajectory.forward(self.number, args, kwargs)

    def reset(self) -> bool:
        """Drop the trajectory unless another thread owns it; returns whether it is gone."""
        return self.trajectory.reset()

    def close(self) -> None:
        """Restore the forwards of the transformer's modules.

        Raises:
            ValueError: something wraps one of them.
        """
        self.trajectory.views[self.number].close()

    def end_of_call(self, *args: Any, **kwargs: Any) -> None:
        """End the trajectory, once for all transformers."""
        if self.number == 0:
            self.trajectory.end_of_call(*args, **kwargs)

    def cache_context(self, name: str, **kwargs: Any) -> Any:
        """Open the transformer's own cache context, and name the calls inside."""
        transformer: Any = self.trajectory.views[self.number].transformer
        own = type(transformer).cache_context(transformer, name, **kwargs)
        return self.trajectory.context(self.number, name, own)


def _kind_of_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return what calls have in common whose values may be reused.

    It is shapes, switches and what is given at all. Numbers are left out, since a timestep may be one.
    """
    leaves = (leaf for leaf in _pytree.tree_leaves((args, kwargs)) if leaf is not None)
    return [
        leaf.shape if isinstance(leaf, Tensor) else leaf if isinstance(leaf, str | bool) else type(leaf)
        for leaf in leaves
    ]


def _timesteps(view: RecordedTransformer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[float]:
    """Return the different timesteps of a call's rows or tokens.

    There is none where the call is given none.
    """
    signature = inspect.signature(type(view.transformer).forward)
    given = signature.bind(view.transformer, *args, **kwargs).arguments
    timestep = next((given[name] for name in _TIMESTEPS if given.get(name) is not None), None)
    return set() if timestep is None else set(torch.as_tensor(timestep).flatten().tolist())
